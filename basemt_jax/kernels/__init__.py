"""GPU kernels behind the plain functions."""
