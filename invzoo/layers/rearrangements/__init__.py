"""Orders, shapes and fixed transforms."""
