"""A clock for products that reads what a test has written down."""

from jaxinfer.autotune.measure import Times


class Clock:
    """Stands for `measure`: XLA takes 100 µs, the kernel's first tiling `100 · factors[M]`.

    Attributes:
        asked: Names of the products measured so far.
    """

    def __init__(self, factors=None, *, fail_at=None, error=KeyboardInterrupt):
        self.factors, self.fail_at, self.error = factors or {}, fail_at, error
        self.asked = []

    def __call__(self, spec, tilings):
        if len(self.asked) == self.fail_at:
            raise self.error
        self.asked.append(spec.name)
        us = 100 * self.factors.get(spec.M, 0.9)
        return Times(xla_us=100.0, kernel_us={t: us + i for i, t in enumerate(tilings)})
