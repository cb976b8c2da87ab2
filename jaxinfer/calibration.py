"""Where the logits of a model's attention lie, and whether one softmax reference serves a head.

FlashDecoding++ (arXiv 2311.01282, section 3): a reference φ near the largest logits spares the
softmax its running maximum, if the logits of a head stay in the range around φ in which nothing
overflows or vanishes.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.models.cache import PagedKVCache
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.functions import forward
from jaxinfer.pallas_kernels.attention.mask import Visibility
from jaxinfer.pallas_kernels.decode_attention.api import Softmax
from jaxinfer.pallas_kernels.observe import observe
from jaxinfer.progress import Progress

FORMAT = 1
# Largest logit of a row less φ, nats, on either side. The kernel trusts sums of 2^-60 to 2^80
# (softmax_sm90.trusted_sums); 2^17 keys and a margin for texts that were not seen are taken off.
SAFE = 40.0


def softmax_modes(softmax: str | Path, num_layers: int) -> tuple[Softmax, ...]:
    """The softmax of every layer of a model.

    Args:
        softmax: `"online"`, `"unified"`, or the file of a calibration of the model.
        num_layers: Of the model.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a calibration, or one of another number of layers.
    """
    calibration = softmax_calibration(softmax)
    if calibration is None:
        return (cast("Softmax", softmax),) * num_layers
    modes = calibration.modes
    if len(modes) != num_layers:
        raise ValueError(
            f"{softmax} is of a model of {len(modes)} layers; this one has {num_layers}"
        )
    return modes


def softmax_calibration(softmax: str | Path) -> "SoftmaxCalibration | None":
    """The calibration that is named, or None for `"online"` and `"unified"`; errors as above."""
    if softmax in ("online", "unified"):
        return None
    path = Path(softmax)
    if not path.exists():
        raise ValueError(f"softmax must be online, unified or a calibration; there is no {path}")
    return SoftmaxCalibration.load(path)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerSoftmax:
    """Logits of one layer, natural, scale and soft cap included; one number per query head.

    Attributes:
        phi: Middle of the rows' largest logits.
        low: Smallest logit.
        high: Largest logit.
        row_low: Smallest of the rows' largest logits.
        row_high: Largest of the rows' largest logits.
        inside: Share of the logits within `SAFE` of φ.
    """

    phi: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    row_low: tuple[float, ...]
    row_high: tuple[float, ...]
    inside: tuple[float, ...]

    @property
    def wide_heads(self) -> tuple[int, ...]:
        """Heads with rows whose largest logit one φ does not serve."""
        half = [(b - a) / 2 for a, b in zip(self.row_low, self.row_high, strict=True)]
        return tuple(i for i, h in enumerate(half) if not h <= SAFE)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SoftmaxCalibration:
    """What a text says about the attention of a model.

    Attributes:
        model: Name of the model.
        tokens: Tokens of text that were seen.
        window: Tokens that were seen together.
        layers: Of every layer.
    """

    model: str
    tokens: int
    window: int
    layers: tuple[LayerSoftmax, ...]

    def save(self, path: Path) -> None:
        """Write a JSON file, whole or not at all."""
        content = json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            scratch.write_text(content + "\n")
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)

    @property
    def modes(self) -> tuple[Softmax, ...]:
        """The softmax of every layer: unified where one reference serves all heads."""
        return tuple("online" if layer.wide_heads else "unified" for layer in self.layers)

    @classmethod
    def load(cls, path: Path) -> "SoftmaxCalibration":
        """Read what `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not a calibration.
        """
        try:
            content = json.loads(path.read_text())
            if content.pop("format") != FORMAT:
                raise ValueError("another format")
            layers = tuple(
                LayerSoftmax(**{name: tuple(map(float, v)) for name, v in layer.items()})
                for layer in content.pop("layers")
            )
            return cls(**content, layers=layers)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a softmax calibration ({error})") from None


def calibrate_softmax(
    model: Decoder,
    token_ids: Sequence[int] | np.ndarray,
    *,
    name: str,
    window: int = 512,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> SoftmaxCalibration:
    """Run a model over a text and note where its attention logits lie.

    Args:
        model: A decoder.
        token_ids: Tokens of the text, of the kind that the model will see.
        name: Of the model, for the result.
        window: Tokens that attend to each other; a shorter rest of the text is left out, unless it
            is all there is.
        max_tokens: Use only the first tokens.
        progress: Called with (`"calibrate"`, tokens done, tokens in all).

    Raises:
        ValueError: an empty text, or a window that is not positive or longer than the context.

    Memory: 4·N·window² bytes for the logits of one layer.
    """
    ids = np.asarray(token_ids, np.int32)[:max_tokens]
    longest = model.config.max_position_embeddings
    if not 1 <= window <= longest:
        raise ValueError(f"window must be 1 to {longest} tokens; got {window}")
    if ids.size == 0:
        raise ValueError("calibration needs a text of at least one token")
    window = min(window, ids.size)
    windows = ids[: ids.size // window * window].reshape(-1, 1, window)
    cache = PagedKVCache.create(
        model.config, batch_size=1, max_len=-(-window // 64) * 64, page_size=64,
        dtype=model.embed[...].dtype,
    )  # fmt: skip
    found: list[dict[str, np.ndarray]] | None = None
    for i, tokens in enumerate(windows):
        seen = jax.device_get(_statistics(model, jnp.asarray(tokens), cache))
        found = (
            seen if found is None else [_joined(*pair) for pair in zip(found, seen, strict=True)]
        )
        if progress is not None:
            progress("calibrate", (i + 1) * window, windows.size)
    assert found is not None
    return SoftmaxCalibration(
        model=name, tokens=int(windows.size), window=window,
        layers=tuple(_layer(statistics) for statistics in found),
    )  # fmt: skip


_BIN, _BINS = 0.25, 8192  # nats, and bins centred on 0; the outermost hold everything beyond


@jax.jit
def _statistics(model: Decoder, tokens: jax.Array, cache: PagedKVCache) -> list[dict[str, Any]]:
    """Of every layer's logits, in order."""
    found: list[dict[str, Any]] = []

    def look(**call: Any) -> None:
        found.append(_of_logits(**call))

    with observe("attention", look):
        forward(model, tokens, cache, fresh=True)
    return found


def _of_logits(
    *,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visibility: Visibility,
    scale: float,
    logits_softcap: float | None,
) -> dict[str, jax.Array]:
    """Extremes and histogram of the visible logits, for every query head."""
    del value
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    grouped = query.reshape(B, T, K, N // K, H).astype(jnp.float32)
    logits = jnp.einsum(
        "btkgh,bskh->kgbts", grouped, key.astype(jnp.float32), precision="highest"
    ).reshape(N, B, T, S)
    logits = logits * scale
    if logits_softcap is not None:
        logits = logits_softcap * jnp.tanh(logits / logits_softcap)
    visible = visibility.mask(jnp.arange(T), jnp.arange(S))
    low, high = (jnp.where(visible, logits, end) for end in (jnp.inf, -jnp.inf))
    peaks = high.max(axis=-1)
    place = jnp.clip(jnp.floor(logits / _BIN).astype(jnp.int32) + _BINS // 2, 0, _BINS - 1)
    count = functools.partial(jnp.bincount, length=_BINS)
    weights = jnp.broadcast_to(visible, logits.shape).reshape(N, -1).astype(jnp.int32)
    return {
        "low": low.min(axis=(1, 2, 3)), "high": high.max(axis=(1, 2, 3)),
        "row_low": peaks.min(axis=(1, 2)), "row_high": peaks.max(axis=(1, 2)),
        "histogram": jax.vmap(count)(place.reshape(N, -1), weights),
    }  # fmt: skip


def _joined(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    joins = {
        "low": np.minimum,
        "row_low": np.minimum,
        "histogram": lambda a, b: a.astype(np.int64) + b,
    }
    return {name: joins.get(name, np.maximum)(one[name], other[name]) for name in one}


def _layer(statistics: dict[str, np.ndarray]) -> LayerSoftmax:
    phi = (statistics["row_low"] + statistics["row_high"]) / 2
    edges = (np.arange(_BINS) - _BINS // 2) * _BIN
    near = (edges >= phi[:, None] - SAFE) & (edges + _BIN <= phi[:, None] + SAFE)
    counts = statistics["histogram"].astype(np.float64)
    inside = (counts * near).sum(axis=1) / counts.sum(axis=1)
    extremes = {name: statistics[name] for name in ("low", "high", "row_low", "row_high")}
    numbers = {"phi": phi, "inside": inside, **extremes}
    if not all(math.isfinite(x) for array in numbers.values() for x in array):
        raise ValueError("the model's attention logits are not finite")
    return LayerSoftmax(**{name: tuple(map(float, array)) for name, array in numbers.items()})
