"""Several processes, on one host or more, that compute together by `jax.distributed`."""

from jaxinfer.distributed.watching import watched

__all__ = ["watched"]
