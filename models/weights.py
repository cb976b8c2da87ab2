"""Names and shapes of a decoder's weights, as every checkpoint reader delivers them.

Matrices are `[in, out]`. RoPE pairs are (i, i + H/2). Norm weights are whole (no `1 +`).
"""

from jaxinfer.models.config import DecoderConfig


def layer_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of one layer, by its name within the layer."""
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * H, config.num_kv_heads * H
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (D,), "q_proj": (D, q), "k_proj": (D, kv), "v_proj": (D, kv),
        "o_proj": (q, D), "mlp_norm": (D,), "gate_proj": (D, F), "up_proj": (D, F),
        "down_proj": (F, D),
    }  # fmt: skip
    if config.qkv_bias:
        shapes |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
    if config.qk_norm:
        shapes |= {"q_norm": (H,), "k_norm": (H,)}
    if config.sandwich_norms:
        shapes |= {"post_attn_norm": (D,), "post_mlp_norm": (D,)}
    return shapes


def weight_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of a decoder, by canonical name, in the order of the forward pass."""
    V, D = config.vocab_size, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embed": (V, D)}
    for layer in range(config.num_layers):
        shapes |= {f"layers.{layer}.{name}": s for name, s in layer_shapes(config).items()}
    shapes["final_norm"] = (D,)
    if not config.tie_embeddings:
        shapes["lm_head"] = (D, V)
    return shapes
