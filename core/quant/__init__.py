"""Fewer bits: what the machine can do with them, which loaders, kernels and attention that leaves, and what falls back."""
