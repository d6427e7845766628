"""The tables and figures of the paper, and those of training runs beside them."""
