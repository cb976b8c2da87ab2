"""Which implementation of `rope_kv_write` is tried first, and whether the projection joins it."""

PREFERRED = ("mosaic", "xla")
# The kernel that does both is taken by name alone until it has been measured on a GPU.
WITH_PROJECTION = ("separate", "mosaic")
