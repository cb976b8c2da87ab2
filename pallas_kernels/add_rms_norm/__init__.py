"""Residual add and root-mean-square normalisation in one pass."""
