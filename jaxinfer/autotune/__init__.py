"""Measures which implementation and tiling suit a model's calls of an op on this device."""
