"""The memory of each ZeRO stage."""
