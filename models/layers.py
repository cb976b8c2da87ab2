"""The parts of a decoder layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.parallel.sequence import SharedTokens
from jaxinfer.models.parallel.shards import Weights
from jaxinfer.pallas_kernels.add_rms_norm.api import add_rms_norm
from jaxinfer.pallas_kernels.attention.api import attention
from jaxinfer.pallas_kernels.decode_attention.api import Softmax, decode_attention
from jaxinfer.pallas_kernels.matmul.api import matmul
from jaxinfer.pallas_kernels.matmul.epilogue import Gate
from jaxinfer.pallas_kernels.matmul.norm import Norm, Tokens
from jaxinfer.pallas_kernels.matmul.with_norm import matmul_and_norm
from jaxinfer.pallas_kernels.rope_kv_write.api import rope_kv_write
from jaxinfer.pallas_kernels.rope_kv_write.with_projection import project_rope_write


def _sum_over(axis: str | None, x: jax.Array) -> jax.Array:
    """Add the parts that the devices of a mesh axis hold; without an axis, `x` is the whole.

    Every part was rounded to the dtype of `x` before, and their sum is once more.
    """
    return x if axis is None else jax.lax.psum(x, axis)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation, computed in float32."""

    def __init__(self, weight: jax.Array, eps: float):
        self.weight = nnx.Param(weight)
        self.eps = eps

    @property
    def norm(self) -> Norm:
        """As ops take it."""
        return Norm(self.weight[...], self.eps)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalise the last axis and multiply by the weight; same shape and dtype."""
        return self.add(None, x)[0]

    def add(
        self, residual: Float[Array, "*B D"] | None, x: Float[Array, "*B D"]
    ) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
        """Normalise `residual + x`; returns the normalised sum and the sum."""
        return add_rms_norm(x, residual, self.weight[...], eps=self.eps)


def _project(
    x: Float[Array, "B T K"],
    weight: Float[Array, "K D"],
    stream: Float[Array, "B T D"],
    norm: RMSNorm,
    *,
    post: RMSNorm | None,
    axis: str | None,
) -> tuple[Float[Array, "B T D"], Tokens]:
    """Add a sub-layer's output to the stream, and normalise it for the next sub-layer.

    Args:
        x: `[B, T, K]` what the sub-layer projects back.
        weight: `[K, D]`.
        stream: `[B, T, D]`.
        norm: Of the next sub-layer.
        post: Applied to the output before it is added, or None.
        axis: Mesh axis whose devices hold parts of the product, or None.

    Returns:
        The stream `[B, T, D]` and its norm.
    """
    if post is None and axis is None:
        return matmul_and_norm(x, weight, residual=stream, norm=norm.norm)
    out = _sum_over(axis, matmul(x, weight))
    normed, stream = norm.add(stream, out if post is None else post(out))
    return stream, normed


class MLP(nnx.Module):
    """Gated feed-forward; gate and up projections are one matrix `[D, 2F]`."""

    def __init__(self, config: DecoderConfig, weights: Weights):
        self.gate_up_proj = nnx.Param(weights("gate_proj", "up_proj"))
        self.down_proj = nnx.Param(weights("down_proj"))
        self.activation: Gate = config.activation

    def __call__(self, x: Tokens) -> Float[Array, "B T F"]:
        """Everything but the projection back; `[B, T, D]` to `[B, T, F]`."""
        return matmul(x, self.gate_up_proj[...], gate=self.activation)


class Attention(nnx.Module):
    """Grouped-query attention over a paged cache; Q, K and V projections are one matrix."""

    def __init__(self, config: DecoderConfig, layer: int, weights: Weights):
        self.qkv_proj = nnx.Param(weights("q_proj", "k_proj", "v_proj"))
        self.qkv_bias = (
            nnx.Param(weights("q_bias", "k_bias", "v_bias")) if config.qkv_bias else None
        )
        eps = config.rms_norm_eps
        self.q_norm = RMSNorm(weights("q_norm"), eps) if config.qk_norm else None
        self.k_norm = RMSNorm(weights("k_norm"), eps) if config.qk_norm else None
        self.o_proj = nnx.Param(weights("o_proj"))
        self.config = config
        self.window = config.window(layer)
        self.softmax: Softmax = "online"  # of decode attention
        self.phi: tuple[float, ...] | None = None  # of every query head, if it is unified

    def __call__(
        self,
        x: Tokens,
        angles: tuple[jax.Array, jax.Array],
        k_pages: jax.Array,
        v_pages: jax.Array,
        page_table: Int[Array, "B M"],
        start: Int[Array, "B"],
        num_tokens: Int[Array, "B"],
        *,
        fresh: bool,
        shared: SharedTokens | None = None,
        counters: jax.Ref | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Attend from new tokens to everything before them, and remember their K and V.

        Args:
            x: `[B, T, D]` normalised hidden states.
            angles: cos and sin, `[B, T, H/2]`.
            k_pages: This layer's `[P, K, p, H]`.
            v_pages: This layer's `[P, K, p, H]`.
            page_table: `[B, M]`.
            start: `[B]` tokens already in the cache.
            num_tokens: `[B]` real tokens among the T.
            fresh: Every row starts at 0, so the chunk's own K and V are all there is.
            shared: The tokens, `start` and `num_tokens` are one device's share of this call's.
            counters: As in `decode_attention`; all layers share them.

        Returns:
            What `o_proj` projects back, `[B, T, N·H]`, and both pools.
        """
        config = self.config
        B, T, _ = x.shape
        pools = (k_pages, v_pages, page_table, start, num_tokens)
        new: list[jax.Array] = []  # keys and values, unless only their pages are needed
        if T == 1 and shared is None:
            q, k_pages, v_pages = project_rope_write(
                x, self.qkv_proj[...], self._bias, *angles, *pools, num_heads=config.num_heads,
                q_norm=None if self.q_norm is None else self.q_norm.norm,
                k_norm=None if self.k_norm is None else self.k_norm.norm,
            )  # fmt: skip
        else:
            q, *new, k_pages, v_pages = self._heads(x, angles, pools)
        options: dict[str, Any] = {
            "scale": config.scale,
            "logits_softcap": config.attention_softcap,
            # Hugging Face counts the query's own key in the window, jax.nn does not.
            "local_window_size": None if self.window is None else (self.window - 1, 0),
        }
        out: Any  # one array: no residual is asked for
        if shared is not None:
            out = shared.attend(
                q, *new, k_pages=k_pages, v_pages=v_pages, page_table=page_table, fresh=fresh,
                counters=counters, **options,
            )  # fmt: skip
        elif fresh and T > 1:
            # Keys after a row's last token are hidden by causality; rows after it are not used.
            out = attention(q, *new, is_causal=True, **options)
        elif T == 1:
            lengths = jnp.where(num_tokens > 0, start + num_tokens, 0)
            phi = None if self.phi is None else jnp.asarray(self.phi, jnp.float32)
            out = decode_attention(
                q, k_pages, v_pages, page_table, lengths, softmax=self.softmax, phi=phi,
                counters=counters, **options,
            )  # fmt: skip
        else:
            out = attention(
                q, k_pages, v_pages, page_table=page_table, is_causal=True, q_offset=start,
                query_seq_lengths=num_tokens, key_value_seq_lengths=start + num_tokens, **options,
            )  # fmt: skip
        return out.reshape(B, T, -1), k_pages, v_pages

    @property
    def _bias(self) -> jax.Array | None:
        return None if self.qkv_bias is None else self.qkv_bias[...]

    def _heads(self, x: Tokens, angles, pools) -> tuple[jax.Array, ...]:
        """Queries, keys and values `[B, T, heads, H]`, rotated, and both pools that hold them."""
        config = self.config
        B, T, _ = x.shape
        N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
        qkv = matmul(x, self.qkv_proj[...], self._bias)
        q, k, v = jnp.split(qkv, [N * H, (N + K) * H], axis=-1)
        q, k, v = q.reshape(B, T, N, H), k.reshape(B, T, K, H), v.reshape(B, T, K, H)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, *pages = rope_kv_write(q, k, v, *angles, *pools)
        return q, k, v, *pages


class DecoderLayer(nnx.Module):
    """Attention and feed-forward with residual connections, norms before and optionally after."""

    def __init__(self, config: DecoderConfig, layer: int, weights: Weights, axis: str | None):
        """Make a layer, or one device's part of it.

        Args:
            config: Its shape; of a part, the part's.
            layer: Its number.
            weights: Gives its arrays by the names of the weights within the layer.
            axis: Mesh axis whose devices hold the parts; None: this is the whole.
        """

        def norm(name: str) -> RMSNorm:
            return RMSNorm(weights(name), config.rms_norm_eps)

        self.attn_norm, self.mlp_norm = norm("attn_norm"), norm("mlp_norm")
        self.post_attn_norm = norm("post_attn_norm") if config.sandwich_norms else None
        self.post_mlp_norm = norm("post_mlp_norm") if config.sandwich_norms else None
        self.attention = Attention(config, layer, weights)
        self.mlp = MLP(config, weights)
        self.axis = axis

    def __call__(
        self,
        x: Float[Array, "B T D"],
        normed: Tokens,
        angles,
        k_pages,
        v_pages,
        *batch: jax.Array,
        next_norm: RMSNorm,
        fresh: bool,
        shared: SharedTokens | None = None,
        counters: jax.Ref | None = None,
    ) -> tuple[jax.Array, Tokens, jax.Array, jax.Array]:
        """Apply, and normalise for whoever comes next: a product can do that where it ends.

        Args:
            x: `[B, T, D]` the stream.
            normed: `[B, T, D]` the stream under `attn_norm`.
            angles: As in `Attention`.
            k_pages: As in `Attention`.
            v_pages: As in `Attention`.
            batch: Page table, start and num_tokens as in `Attention`.
            next_norm: The next layer's `attn_norm`, or the model's last norm.
            fresh: As in `Attention`.
            shared: As in `Attention`.
            counters: As in `Attention`.

        Returns:
            The next `x` and `normed`, and both pools.
        """
        heads, k_pages, v_pages = self.attention(
            normed, angles, k_pages, v_pages, *batch, fresh=fresh, shared=shared, counters=counters,
        )  # fmt: skip
        x, normed = _project(
            heads, self.attention.o_proj[...], x, self.mlp_norm,
            post=self.post_attn_norm, axis=self.axis,
        )  # fmt: skip
        hidden = self.mlp(normed)
        x, normed = _project(
            hidden, self.mlp.down_proj[...], x, next_norm, post=self.post_mlp_norm, axis=self.axis
        )
        return x, normed, k_pages, v_pages
