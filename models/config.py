"""The shape of a decoder: one dataclass for every family."""

import dataclasses
import math
from typing import Literal

ROPE_TYPES = ("linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the training context.

    Field names are those of Hugging Face's `rope_scaling` in `config.json`.

    Attributes:
        rope_type: `"linear"`, `"llama3"` or `"yarn"`.
        factor: Ratio of the new to the trained context.
        original_max_position_embeddings: Trained context in tokens (llama3, yarn).
        low_freq_factor: llama3: wavelengths longer than context/low are divided by `factor`.
        high_freq_factor: llama3: wavelengths shorter than context/high are kept.
        beta_fast: yarn: rotations above which a frequency is kept.
        beta_slow: yarn: rotations below which a frequency is divided by `factor`.
        attention_factor: yarn: multiplies cos and sin; None means 0.1 ln(factor) + 1.
    """

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type must be one of {ROPE_TYPES}; got {self.rope_type!r}")
        if not self.factor >= 1:
            raise ValueError(f"rope scaling factor must be at least 1; got {self.factor}")
        if self.rope_type != "linear" and self.original_max_position_embeddings <= 0:
            raise ValueError(
                f"rope_type={self.rope_type!r} needs original_max_position_embeddings > 0; "
                f"got {self.original_max_position_embeddings}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """Everything that distinguishes one decoder from another.

    Families are values of this class, not subclasses of the model. Norm weights are stored whole
    (Gemma's `1 + w` is added when a checkpoint is read).

    Attributes:
        family: `"llama"`, `"qwen2"`, `"qwen3"` or `"gemma3"`; for messages and files only.
        vocab_size: V.
        hidden_size: D.
        num_layers: L.
        num_heads: N, query heads.
        num_kv_heads: K; divides N.
        head_dim: H; even.
        intermediate_size: F.
        max_position_embeddings: Longest context, tokens.
        rms_norm_eps: Added to the mean square in RMSNorm.
        rope_theta: Rotary base of global layers.
        rope_scaling: Stretch of the global layers' frequencies, or None.
        local_rope_theta: Rotary base of sliding-window layers; None: as the global one.
        sliding_window: Keys a local layer sees, the query's own included; None: no local layers.
        local_layers: Per layer, whether it uses the sliding window; empty: none does.
        activation: Gate of the feed-forward: `"silu"` or `"gelu_tanh"`.
        qkv_bias: Bias on the Q, K and V projections (Qwen2).
        qk_norm: RMSNorm over H on each query and key head before RoPE (Qwen3, Gemma 3).
        sandwich_norms: RMSNorm on the output of attention and feed-forward too (Gemma).
        attention_softcap: Logits become c·tanh(logits / c); None: off.
        final_softcap: The same on the output logits; None: off.
        attention_scale: Factor on q·k; None: 1/sqrt(H).
        embedding_scale: Factor on embeddings (Gemma: sqrt(D)).
        tie_embeddings: The output projection is the embedding.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    sliding_window: int | None = None
    local_layers: tuple[bool, ...] = ()
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False
    attention_softcap: float | None = None
    final_softcap: float | None = None
    attention_scale: float | None = None
    embedding_scale: float = 1.0
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
            "intermediate_size", "max_position_embeddings",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        if not (self.rms_norm_eps >= 0 and math.isfinite(self.rms_norm_eps)):
            raise ValueError(
                f"rms_norm_eps must be finite and not negative; got {self.rms_norm_eps}"
            )
        for name in ("rope_theta", "local_rope_theta"):
            theta = getattr(self, name)
            if theta is not None and not (theta > 0 and math.isfinite(theta)):
                raise ValueError(f"{name} must be finite and positive; got {theta}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads; "
                f"got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even; got {self.head_dim}")
        if self.local_layers and len(self.local_layers) != self.num_layers:
            raise ValueError(
                f"local_layers must have one entry per layer ({self.num_layers}); "
                f"got {len(self.local_layers)}"
            )
        if any(self.local_layers) and self.sliding_window is None:
            raise ValueError("local_layers need a sliding_window")
        if self.activation not in ("silu", "gelu_tanh"):
            raise ValueError(f"activation must be silu or gelu_tanh; got {self.activation!r}")

    @property
    def scale(self) -> float:
        """Factor on q·k."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer, or None if it is global."""
        return self.sliding_window if self.local_layers and self.local_layers[layer] else None

    @property
    def num_parameters(self) -> int:
        """Weights of the model, biases and norms left out."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size
        heads = 1 if self.tie_embeddings else 2
        return self.num_layers * layer + heads * self.vocab_size * self.hidden_size

    @classmethod
    def llama2_7b(cls) -> "DecoderConfig":
        """Shape of Llama-2-7B."""
        return cls(
            family="llama", vocab_size=32_000, hidden_size=4096, num_layers=32, num_heads=32,
            num_kv_heads=32, head_dim=128, intermediate_size=11_008, max_position_embeddings=4096,
        )  # fmt: skip

    @classmethod
    def llama3_8b(cls) -> "DecoderConfig":
        """Shape of Llama-3-8B."""
        return cls(
            family="llama", vocab_size=128_256, hidden_size=4096, num_layers=32, num_heads=32,
            num_kv_heads=8, head_dim=128, intermediate_size=14_336, max_position_embeddings=8192,
            rope_theta=500_000.0,
        )  # fmt: skip

    @classmethod
    def smollm2_135m(cls) -> "DecoderConfig":
        """Shape of SmolLM2-135M."""
        return cls(
            family="llama", vocab_size=49_152, hidden_size=576, num_layers=30, num_heads=9,
            num_kv_heads=3, head_dim=64, intermediate_size=1536, max_position_embeddings=8192,
            rope_theta=100_000.0, tie_embeddings=True,
        )  # fmt: skip

    @classmethod
    def tiny(cls, **overrides: object) -> "DecoderConfig":
        """A model small enough for any test; `overrides` replace single fields."""
        fields: dict[str, object] = {
            "family": "llama", "vocab_size": 256, "hidden_size": 64, "num_layers": 2,
            "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "intermediate_size": 128,
            "max_position_embeddings": 512,
        }  # fmt: skip
        return cls(**(fields | overrides))  # type: ignore[arg-type]
