"""Decoders in Flax NNX, their paged KV cache, and readers of their checkpoints."""
