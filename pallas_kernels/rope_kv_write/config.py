"""Which implementation of `rope_kv_write` is tried first."""

PREFERRED = ("mosaic", "xla")
