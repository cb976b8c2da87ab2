"""Several processes, on one host or more, that compute together by `jax.distributed`."""
