"""Fused Pallas kernels of the per-parameter rule."""
