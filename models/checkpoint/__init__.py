"""Readers of model files; `open_checkpoint` picks one, `load_model` builds a decoder from it."""
