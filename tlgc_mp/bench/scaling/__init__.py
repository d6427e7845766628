"""The time and memory of a step, over widths, strategies, ranks and networks."""
