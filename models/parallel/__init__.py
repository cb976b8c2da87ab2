"""Tensor parallelism: how a decoder's heads, weights and pages are divided over a mesh."""
