"""Kernels for CPUs in C, for what torch has no fast operation."""
