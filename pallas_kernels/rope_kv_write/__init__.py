"""Rotary embedding of queries and keys, fused with the write into the paged cache."""
