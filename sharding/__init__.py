"""Meshes, sequence parallelism and multi-host start-up (nothing is public here yet)."""
