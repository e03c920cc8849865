"""A step compiled ahead of time, and what its program says."""
