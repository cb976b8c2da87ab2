"""The decoder: one Flax NNX module for every family, told apart by its configuration."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxinfer.models.cache import PagedKVCache
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.dtypes import check_floating
from jaxinfer.models.layers import DecoderLayer, RMSNorm
from jaxinfer.models.parallel.parallel import Parallel
from jaxinfer.models.parallel.sequence import SharedTokens
from jaxinfer.models.parallel.shards import Weights, divided_weights, split, whole_weights
from jaxinfer.models.progress import Progress
from jaxinfer.models.rope import rope_angles, uses_local_rope
from jaxinfer.models.weights import weight_shapes
from jaxinfer.pallas_kernels.decode_attention.api import Softmax
from jaxinfer.pallas_kernels.matmul.api import matmul
from jaxinfer.pallas_kernels.matmul.norm import Tokens, divided
from jaxinfer.sharding.mesh import TENSOR


class Decoder(nnx.Module):
    """A decoder-only transformer with a paged KV cache.

    Layers are unrolled in the computation. A `lax.scan` over stacked layers compiles faster but
    copies every layer's weights each step: three times slower in decode (docs/models.md).

    A decoder may be divided over the devices of a mesh (`parallel`). It is called in the same way,
    with a cache that is divided likewise; tokens, hidden states and scores are whole, the same on
    every device.

    Attributes:
        config: The model's shape; static under `jax.jit`.
        parallel: How it is divided, static too; None: it is on one device.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: Any = jnp.bfloat16,
        rngs: nnx.Rngs | None = None,
        weight: Callable[[str], jax.Array] | None = None,
        mesh: str | Mesh | None = None,
    ):
        """Make a decoder; without `weight`, a random one for tests and timing.

        Args:
            config: The model's shape.
            dtype: Of random weights and of all that are divided, and so of the residual stream.
            rngs: Source of random weights (normal, 1/sqrt(fan-in)); default seed 0.
            weight: Gives the array of a canonical name; see `from_weights`.
            mesh: Divide the model over these devices; `"tensor=2"`, or a mesh.

        Raises:
            ValueError: a mesh that cannot be made, or that models are not divided over.
            TypeError: a dtype that is not floating.
        """
        check_floating(dtype)
        weight = weight or _random_weights(config, dtype, rngs or nnx.Rngs(0))
        parallel = None if mesh is None else Parallel.create(config, mesh)
        if parallel is None:
            weights, local, axis = whole_weights(weight), config, None
        else:
            weights = divided_weights(weight, parallel, dtype)
            local, axis = parallel.local, TENSOR
        self.config = config
        self.parallel = parallel
        self.embed = nnx.Param(weights("embed"))
        self.layers = nnx.List(
            DecoderLayer(local, i, functools.partial(_of_layer, weights, i), axis)
            for i in range(config.num_layers)
        )
        self.final_norm = RMSNorm(weights("final_norm"), config.rms_norm_eps)
        self.lm_head = None if config.tie_embeddings else nnx.Param(weights("lm_head"))

    def with_softmax(
        self, modes: Sequence[Softmax], phi: Sequence[Sequence[float] | None] | None = None
    ) -> "Decoder":
        """The same weights with another softmax in the decode attention of every layer.

        Args:
            modes: One per layer, as in `decode_attention`.
            phi: One per layer: references of its query heads where it is unified, or None, as in
                `decode_attention`. Default: None for all.

        Raises:
            ValueError: another number of modes or references than of layers, of references than of
                query heads, references of a layer that is not unified, or a unified softmax in a
                decoder that is divided over devices.
        """
        if len(modes) != len(self.layers):
            raise ValueError(f"softmax must have {len(self.layers)} modes; got {len(modes)}")
        phi = [None] * len(self.layers) if phi is None else phi
        if len(phi) != len(self.layers):
            raise ValueError(
                f"phi must have an entry for {len(self.layers)} layers; got {len(phi)}"
            )
        for number, (mode, heads) in enumerate(zip(modes, phi, strict=True)):
            if heads is not None and (mode != "unified" or len(heads) != self.config.num_heads):
                raise ValueError(
                    f"phi of layer {number} must be one number for each of "
                    f"{self.config.num_heads} query heads of a unified softmax; "
                    f"got {len(heads)} for softmax={mode!r}"
                )
        if self.parallel is not None and any(mode != "online" for mode in modes):
            raise ValueError("a model that is divided over devices has the online softmax only")
        other: Decoder = jax.tree.map(lambda x: x, self)
        for layer, mode, heads in zip(other.layers, modes, phi, strict=True):
            layer.attention.softmax = mode
            layer.attention.phi = None if heads is None else tuple(map(float, heads))
        return other

    @property
    def part(self) -> DecoderConfig:
        """The shape that each device computes: the whole, or `Parallel.local`."""
        return self.config if self.parallel is None else self.parallel.local

    @property
    def devices(self) -> list[Any]:
        """Those of this process that hold the model, or where one will be put by default."""
        return jax.local_devices()[:1] if self.parallel is None else self.parallel.devices

    @classmethod
    def from_weights(
        cls,
        config: DecoderConfig,
        read: Callable[[str], np.ndarray],
        *,
        dtype: Any = jnp.bfloat16,
        progress: Progress | None = None,
        mesh: str | Mesh | None = None,
    ) -> "Decoder":
        """Build a decoder from weights read one at a time.

        Args:
            config: The model's shape.
            read: Gives the weight of a canonical name (`models.weights.weight_shapes`).
            dtype: What the weights are converted to.
            progress: Called with (name, weights read, weights in all) after each.
            mesh: Divide the model over these devices. Each is given its own parts only.

        Raises:
            ValueError: a weight of another shape than `config` says, or a mesh as in `Decoder`.
        """
        shapes = weight_shapes(config)
        done = itertools.count(1)

        def weight(name: str) -> Any:
            array = read(name)
            if array.shape != shapes[name]:
                raise ValueError(f"weight {name} must have shape {shapes[name]}; got {array.shape}")
            if progress is not None:
                progress(name, next(done), len(shapes))
            # What is divided stays on the host until it is known which device needs what.
            return array if mesh is not None else jnp.asarray(array).astype(dtype)

        return cls(config, dtype=dtype, weight=weight, mesh=mesh)

    def divide(self, mesh: str | Mesh) -> "Decoder":
        """The same model divided over a mesh, in its dtype.

        Weights go through the host. The model itself stays where it is: `from_weights` with a mesh
        needs no device that holds all of it.

        Raises:
            ValueError: a mesh as in `Decoder`.
        """
        weights = {name: np.asarray(array) for name, array in self.canonical_weights()}
        dtype = self.embed[...].dtype
        return Decoder.from_weights(self.config, weights.__getitem__, dtype=dtype, mesh=mesh)

    def replicas(self) -> list["Decoder"]:
        """The copies of a model along the mesh axis `data`, each for its own devices.

        They share the arrays of this one; nothing is moved.
        """
        if self.parallel is None:
            return [self]
        leaves, structure = jax.tree.flatten(self)
        copies = []
        for part in self.parallel.replicas():
            copy: Decoder = jax.tree.unflatten(structure, [part.of(array) for array in leaves])
            copy.parallel = part
            copies.append(copy)
        return copies

    def canonical_weights(self) -> Iterator[tuple[str, jax.Array | np.ndarray]]:
        """Every weight under its canonical name; fused matrices are split again.

        Weights of a divided model are put together on the host.
        """
        shapes = weight_shapes(self.config)
        for names, array in self._arrays():
            yield from split(names, array, shapes, self.parallel)

    def _arrays(self) -> Iterator[tuple[tuple[str, ...], jax.Array]]:
        """Every array, with the canonical names of the weights that lie in it side by side."""
        config = self.config
        yield ("embed",), self.embed[...]
        for i, layer in enumerate(self.layers):
            attention = layer.attention
            parts: dict[tuple[str, ...], jax.Array] = {
                ("attn_norm",): layer.attn_norm.weight[...],
                ("mlp_norm",): layer.mlp_norm.weight[...],
                ("o_proj",): attention.o_proj[...],
                ("down_proj",): layer.mlp.down_proj[...],
                ("q_proj", "k_proj", "v_proj"): attention.qkv_proj[...],
                ("gate_proj", "up_proj"): layer.mlp.gate_up_proj[...],
            }
            if attention.qkv_bias is not None:
                parts["q_bias", "k_bias", "v_bias"] = attention.qkv_bias[...]
            if config.qk_norm:
                parts |= {(n,): getattr(attention, n).weight[...] for n in ("q_norm", "k_norm")}
            if config.sandwich_norms:
                names = ("post_attn_norm", "post_mlp_norm")
                parts |= {(n,): getattr(layer, n).weight[...] for n in names}
            for names, array in parts.items():
                yield tuple(f"layers.{i}.{name}" for name in names), array
        yield ("final_norm",), self.final_norm.weight[...]
        if self.lm_head is not None:
            yield ("lm_head",), self.lm_head[...]

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
        if self.parallel is None:
            return self._append(tokens, cache, num_tokens, fresh=fresh)
        whole, divided = PartitionSpec(), cache.specs()
        return self.parallel.run(
            functools.partial(Decoder._append, fresh=fresh), self, tokens, cache, num_tokens,
            in_specs=(whole, divided, whole), out_specs=(whole, divided),
        )  # fmt: skip

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Scores of the next token, float32, soft cap applied."""
        if self.parallel is None:
            return self._scores(hidden)
        whole = PartitionSpec()
        return self.parallel.run(
            Decoder._gathered_scores, self, hidden, in_specs=(whole,), out_specs=whole
        )

    def _append(
        self,
        tokens: Int[Array, "B T"],
        cache: PagedKVCache,
        num_tokens: Int[Array, "B"],
        *,
        fresh: bool,
    ) -> tuple[Float[Array, "B T D"], PagedKVCache]:
        """What one device computes of `__call__`: all of it, or its part."""
        config = self.config
        T = tokens.shape[1]
        start, count, shared = cache.lengths, num_tokens, None
        if self.parallel is None or self.parallel.seq == 1:
            positions = start[:, None] + jnp.arange(T, dtype=jnp.int32)
        else:
            shared = SharedTokens.create(T, start, num_tokens, self.parallel.seq)
            tokens, positions = shared.take(tokens), shared.positions()
            start, count = shared.start, shared.num_tokens
        angles = {False: rope_angles(config, positions, local=False)}
        if uses_local_rope(config):
            angles[True] = rope_angles(config, positions, local=True)

        x = self._embedded(tokens)
        if config.embedding_scale != 1.0:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        normed: Tokens = self.layers[0].attn_norm(x)
        norms = [*(layer.attn_norm for layer in self.layers), self.final_norm]
        k_pages, v_pages = list(cache.k_pages), list(cache.v_pages)
        # Decode attention counts in them; every layer leaves zeros to the next.
        rows = tokens.shape[0] * self.part.num_kv_heads
        counters = jax.new_ref(jnp.zeros((rows,), jnp.int32)) if tokens.shape[1] == 1 else None
        for i, layer in enumerate(self.layers):
            local = bool(config.local_layers) and config.local_layers[i]
            x, normed, k_pages[i], v_pages[i] = layer(
                x, normed, angles.get(local, angles[False]), k_pages[i], v_pages[i],
                cache.page_table, start, count, next_norm=norms[i + 1], fresh=fresh, shared=shared,
                counters=counters,
            )  # fmt: skip
        cache = cache.replace(
            k_pages=tuple(k_pages), v_pages=tuple(v_pages), lengths=cache.lengths + num_tokens
        )
        hidden = divided(normed)
        return hidden if shared is None else shared.gather(hidden, fresh=fresh), cache

    def _embedded(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        table = self.embed[...]
        if self.parallel is None:
            return table[tokens]
        # Each device has some rows. Only one adds anything, so that nothing is rounded.
        rows = tokens - jax.lax.axis_index(TENSOR) * table.shape[0]
        here = (rows >= 0) & (rows < table.shape[0])
        found = jnp.where(here[..., None], table[jnp.where(here, rows, 0)], 0)
        return jax.lax.psum(found, TENSOR)

    def _gathered_scores(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Scores of the whole vocabulary, from every device's part of it."""
        scores = self._scores(hidden)
        scores = jax.lax.all_gather(scores, TENSOR, axis=scores.ndim - 1, tiled=True)
        return scores[..., : self.config.vocab_size]

    def _scores(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Scores of the part of the vocabulary that is here."""
        tied = self.lm_head is None
        head = self.embed if self.lm_head is None else self.lm_head
        scores = matmul(hidden, head[...], transposed=tied, out_dtype=jnp.float32)
        if (cap := self.config.final_softcap) is not None:
            scores = cap * jnp.tanh(scores / cap)
        return scores


def _of_layer(weights: Weights, layer: int, *names: str) -> jax.Array:
    return weights(*(f"layers.{layer}.{name}" for name in names))


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
