"""Functions of each value."""
