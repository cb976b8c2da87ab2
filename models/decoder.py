"""The decoder: one Flax NNX module for every family, told apart by its configuration."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxinfer.models.cache import PagedKVCache
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.layers import DecoderLayer, RMSNorm
from jaxinfer.models.progress import Progress
from jaxinfer.models.rope import rope_angles, uses_local_rope
from jaxinfer.models.weights import weight_shapes


class Decoder(nnx.Module):
    """A decoder-only transformer with a paged KV cache.

    Layers are unrolled in the computation. A `lax.scan` over stacked layers compiles faster but
    copies every layer's weights each step: three times slower in decode (docs/models.md).

    Attributes:
        config: The model's shape; static under `jax.jit`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: Any = jnp.bfloat16,
        rngs: nnx.Rngs | None = None,
        weight: Callable[[str], jax.Array] | None = None,
    ):
        """Make a decoder; without `weight`, a random one for tests and timing.

        Args:
            config: The model's shape.
            dtype: Of random weights, and so of the residual stream.
            rngs: Source of random weights (normal, 1/sqrt(fan-in)); default seed 0.
            weight: Gives the array of a canonical name; see `from_weights`.
        """
        weight = weight or _random_weights(config, dtype, rngs or nnx.Rngs(0))
        self.config = config
        self.embed = nnx.Param(weight("embed"))
        self.layers = nnx.List(
            DecoderLayer(config, i, functools.partial(_of_layer, weight, i))
            for i in range(config.num_layers)
        )
        self.final_norm = RMSNorm(weight("final_norm"), config.rms_norm_eps)
        self.lm_head = None if config.tie_embeddings else nnx.Param(weight("lm_head"))

    @classmethod
    def from_weights(
        cls,
        config: DecoderConfig,
        read: Callable[[str], np.ndarray],
        *,
        dtype: Any = jnp.bfloat16,
        progress: Progress | None = None,
    ) -> "Decoder":
        """Build a decoder from weights read one at a time.

        Args:
            config: The model's shape.
            read: Gives the weight of a canonical name (`models.weights.weight_shapes`).
            dtype: What the weights are converted to.
            progress: Called with (name, weights read, weights in all) after each.

        Raises:
            ValueError: a weight of another shape than `config` says.
        """
        shapes = weight_shapes(config)
        done = itertools.count(1)

        def weight(name: str) -> jax.Array:
            array = read(name)
            if array.shape != shapes[name]:
                raise ValueError(f"weight {name} must have shape {shapes[name]}; got {array.shape}")
            if progress is not None:
                progress(name, next(done), len(shapes))
            return jnp.asarray(array).astype(dtype)

        return cls(config, weight=weight)

    def canonical_weights(self) -> Iterator[tuple[str, jax.Array]]:
        """Every weight under its canonical name; fused matrices are split again."""
        config = self.config
        N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
        cuts = [N * H, (N + K) * H]
        yield "embed", self.embed[...]
        for i, layer in enumerate(self.layers):
            parts: dict[str, jax.Array] = {
                "attn_norm": layer.attn_norm.weight[...],
                "mlp_norm": layer.mlp_norm.weight[...],
                "o_proj": layer.attention.o_proj[...],
                "down_proj": layer.mlp.down_proj[...],
            }
            qkv = jnp.split(layer.attention.qkv_proj[...], cuts, axis=1)
            parts |= dict(zip(("q_proj", "k_proj", "v_proj"), qkv, strict=True))
            gate_up = jnp.split(layer.mlp.gate_up_proj[...], 2, axis=1)
            parts |= dict(zip(("gate_proj", "up_proj"), gate_up, strict=True))
            if layer.attention.qkv_bias is not None:
                biases = jnp.split(layer.attention.qkv_bias[...], cuts)
                parts |= dict(zip(("q_bias", "k_bias", "v_bias"), biases, strict=True))
            if config.qk_norm:
                parts |= {n: getattr(layer.attention, n).weight[...] for n in ("q_norm", "k_norm")}
            if config.sandwich_norms:
                names = ("post_attn_norm", "post_mlp_norm")
                parts |= {n: getattr(layer, n).weight[...] for n in names}
            for name, array in parts.items():
                yield f"layers.{i}.{name}", array
        yield "final_norm", self.final_norm.weight[...]
        if self.lm_head is not None:
            yield "lm_head", self.lm_head[...]

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        cache: PagedKVCache,
        num_tokens: Int[Array, "B"],
        *,
        fresh: bool = False,
    ) -> tuple[Float[Array, "B T D"], PagedKVCache]:
        """Append tokens to the cache and return the normalised hidden states.

        Args:
            tokens: `[B, T]` int32, padded on the right.
            cache: Where each row's earlier tokens are; tokens are written behind them.
            num_tokens: `[B]` int32 real tokens per row, 0 … T.
            fresh: The caller promises that `cache.lengths` are all 0. Recompiles.

        Returns:
            `[B, T, D]`, and the cache with the tokens appended.
        """
        config = self.config
        T = tokens.shape[1]
        start = cache.lengths
        positions = start[:, None] + jnp.arange(T, dtype=jnp.int32)
        angles = {False: rope_angles(config, positions, local=False)}
        if uses_local_rope(config):
            angles[True] = rope_angles(config, positions, local=True)

        delta = self.embed[...][tokens]
        if config.embedding_scale != 1.0:
            delta = delta * jnp.asarray(config.embedding_scale, delta.dtype)
        x = None
        k_pages, v_pages = list(cache.k_pages), list(cache.v_pages)
        for i, layer in enumerate(self.layers):
            local = bool(config.local_layers) and config.local_layers[i]
            x, delta, k_pages[i], v_pages[i] = layer(
                x, delta, angles.get(local, angles[False]), k_pages[i], v_pages[i],
                cache.page_table, start, num_tokens, fresh=fresh,
            )  # fmt: skip
        cache = cache.replace(
            k_pages=tuple(k_pages), v_pages=tuple(v_pages), lengths=start + num_tokens
        )
        return self.final_norm.add(x, delta)[0], cache

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Scores of the next token, float32, soft cap applied."""
        head = self.embed[...].T if self.lm_head is None else self.lm_head[...]
        scores = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
        if (cap := self.config.final_softcap) is not None:
            scores = cap * jnp.tanh(scores / cap)
        return scores


def _of_layer(weight: Callable[[str], jax.Array], layer: int, name: str) -> jax.Array:
    return weight(f"layers.{layer}.{name}")


def _random_weights(
    config: DecoderConfig, dtype: Any, rngs: nnx.Rngs
) -> Callable[[str], jax.Array]:
    key = rngs.params()
    shapes = weight_shapes(config)
    index = {name: i for i, name in enumerate(shapes)}

    def weight(name: str) -> jax.Array:
        shape = shapes[name]
        if "norm" in name:
            return jnp.ones(shape, dtype)
        fan_in = config.hidden_size if name == "embed" else shape[0]
        return _normal(jax.random.fold_in(key, index[name]), shape, fan_in**-0.5, dtype)

    return weight


@jax.jit(static_argnums=(1, 2, 3))
def _normal(key: jax.Array, shape: tuple[int, ...], scale: float, dtype: Any) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(scale)).astype(dtype)
