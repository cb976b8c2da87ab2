"""Attention of a few query tokens over a paged KV cache."""
