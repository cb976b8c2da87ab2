"""Which implementation of `add_rms_norm` is tried first."""

PREFERRED = ("mosaic", "xla")
