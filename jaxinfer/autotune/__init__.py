"""Measures which implementation and tiling suit a model's products on this device."""
