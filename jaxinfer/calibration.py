"""Where the logits of a model's attention lie, and whether one softmax reference serves a head.

FlashDecoding++ (arXiv 2311.01282, section 3): a reference φ near the largest logits spares the
softmax its running maximum, if the sums of a head's weights relative to φ stay in the range in
which nothing overflows or vanishes. Which range that is depends on the dtype.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.models.cache import PagedKVCache
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.functions import forward
from jaxinfer.pallas_kernels.attention.mask import Visibility
from jaxinfer.pallas_kernels.decode_attention.api import Softmax
from jaxinfer.pallas_kernels.decode_attention.softmax_sm90 import trusted_sums
from jaxinfer.pallas_kernels.observe import observe
from jaxinfer.progress import Progress

FORMAT = 2
# Keys whose sums the kernel judges by themselves, at the least: its pieces are whole blocks of 64
# or 128 keys, and what a row sees of them.
BLOCK = 64
# Share of the range that is trusted, in nats, that is left free: for texts that were not seen and
# for longer contexts, whose sums are larger.
MARGIN = 1 / 8


def softmax_of_layers(
    softmax: str | Path, num_layers: int, dtype: Any
) -> tuple[tuple[Softmax, ...], tuple[tuple[float, ...] | None, ...]]:
    """The softmax of every layer of a model, and its references where they are calibrated.

    Args:
        softmax: `"online"`, `"unified"`, or the file of a calibration of the model.
        num_layers: Of the model.
        dtype: That the model runs in.

    Returns:
        A mode per layer, and references per layer and query head. None: where it is online, or
        where it is unified without a calibration, which takes references from the keys.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is missing or a folder, it is not a calibration, or one of another number of
            layers, or for a dtype whose sums are trusted in another range.
    """
    calibration = softmax_calibration(softmax)
    if calibration is None:
        modes: tuple[Softmax, ...] = (cast("Softmax", softmax),) * num_layers
        return modes, (None,) * num_layers
    modes = calibration.modes
    if len(modes) != num_layers:
        raise ValueError(
            f"{softmax} is of a model of {len(modes)} layers; this one has {num_layers}"
        )
    if trusted_sums(dtype) != trusted_sums(calibration.dtype):
        name = jnp.dtype(dtype).name
        raise ValueError(
            f"{softmax} is of a model in {calibration.dtype}; this one runs in {name}: "
            f"calibrate it with --dtype {name}"
        )
    of_layers = zip(modes, calibration.layers, strict=True)
    return modes, tuple(layer.phi if mode == "unified" else None for mode, layer in of_layers)


def softmax_calibration(softmax: str | Path) -> "SoftmaxCalibration | None":
    """The calibration that is named, or None for `"online"` and `"unified"`; errors as above."""
    if softmax in ("online", "unified"):
        return None
    path = Path(softmax)
    if not path.exists():
        raise ValueError(f"softmax must be online, unified or a calibration; there is no {path}")
    if path.is_dir():
        raise ValueError(f"softmax must be online, unified or a calibration; {path} is a folder")
    return SoftmaxCalibration.load(path)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerSoftmax:
    """Logits of one layer, natural, scale and soft cap included; one number per query head.

    The sums are those of exp(logit) that a piece of a decode step may have, as logarithms: over any
    run of whole blocks of `BLOCK` keys, of which a row sees those up to its position.

    Attributes:
        phi: Reference: the smallest and the largest sum relative to it are equally far from the
            ends of the range that is trusted.
        low: Smallest logit.
        high: Largest logit.
        sum_low: Smallest sum: of one block.
        sum_high: Largest sum: of all keys of a row.
        inside: Share of the logits whose weights relative to φ lie in the range of the sums.
    """

    phi: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    sum_low: tuple[float, ...]
    sum_high: tuple[float, ...]
    inside: tuple[float, ...]

    def wide_heads(self, dtype: Any) -> tuple[int, ...]:
        """Heads that φ does not serve, or not with `MARGIN` to spare, in a model of this dtype."""
        least, largest = _log_limits(dtype)
        spare = (largest - least) * MARGIN / 2
        of_heads = zip(self.phi, self.sum_low, self.sum_high, strict=True)
        return tuple(
            head for head, (phi, low, high) in enumerate(of_heads)
            if not (low - phi >= least + spare and high - phi <= largest - spare)
        )  # fmt: skip

    def verdict(self, dtype: Any) -> dict[str, Any]:
        """Whether φ serves each head, and what follows for the layer, as JSON values."""
        wide = self.wide_heads(dtype)
        return {
            "unified": [head not in wide for head in range(len(self.phi))],
            "softmax": "online" if wide else "unified",
        }


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SoftmaxCalibration:
    """What a text says about the attention of a model.

    Attributes:
        model: Name of the model.
        dtype: That it ran in, which decides which sums are trusted.
        tokens: Tokens of text that were seen.
        window: Tokens that were seen together.
        layers: Of every layer.
    """

    model: str
    dtype: str
    tokens: int
    window: int
    layers: tuple[LayerSoftmax, ...]

    def __post_init__(self) -> None:
        jnp.dtype(self.dtype)  # refuses what is none

    def save(self, path: Path) -> None:
        """Write a JSON file, whole or not at all.

        Raises:
            OSError: it cannot be written; names `path` as given.
        """
        content = json.dumps({"format": FORMAT, **self.as_dict()}, indent=1)
        with _scratch(path) as scratch:
            scratch.write_text(content + "\n", encoding="utf-8")
            scratch.replace(path)

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values, and in every layer the verdict.

        `unified` says for every query head whether its reference serves it, `softmax` which softmax
        a model takes in this layer.
        """
        content = dataclasses.asdict(self)
        for numbers, layer in zip(content["layers"], self.layers, strict=True):
            numbers.update(layer.verdict(self.dtype))
        return content

    @property
    def modes(self) -> tuple[Softmax, ...]:
        """The softmax of every layer: unified where one reference per head serves all heads."""
        return tuple(layer.verdict(self.dtype)["softmax"] for layer in self.layers)

    @classmethod
    def load(cls, path: Path) -> "SoftmaxCalibration":
        """Read what `save` wrote; files of earlier versions have no verdict.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not a calibration, or its verdict is not that of its numbers.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError("another format")
            written = content.pop("layers")
            layers = tuple(_layer(numbers, content["dtype"]) for numbers in written)
            return cls(**content, layers=layers)
        # The last two: numbers and lists that Python has no room for.
        except (
            AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError
        ) as error:  # fmt: skip
            raise ValueError(f"{path} is not a softmax calibration ({error})") from None


def _layer(written: dict[str, Any], dtype: str) -> LayerSoftmax:
    """A layer of a file; its verdict, which follows from the numbers, must be theirs."""
    numbers = {name: x for name, x in written.items() if name not in ("unified", "softmax")}
    layer = LayerSoftmax(**{name: tuple(map(float, x)) for name, x in numbers.items()})
    for name, follows in layer.verdict(dtype).items():
        if written.get(name, follows) != follows:
            raise ValueError(
                f"{name} must be {follows}, by the numbers beside it; got {written[name]}: "
                "calibrate anew"
            )
    return layer


def check_target(path: Path) -> None:
    """Whether a file can be written there, before there is anything to write.

    Raises:
        OSError: it cannot; names `path` as given.
    """
    # Permissions alone do not tell: of file systems that are read-only, or as root.
    with _scratch(path) as scratch:
        scratch.touch()


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """Name of a file beside `path`, which is gone afterwards; errors are of `path` instead."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            yield scratch
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


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
        model: A decoder on one device.
        token_ids: Tokens of the text, of the kind that the model will see.
        name: Of the model, for the result.
        window: Tokens that attend to each other; a shorter rest of the text is left out, unless it
            is all there is.
        max_tokens: Use only the first tokens.
        progress: Called with (`"calibrate"`, tokens done, tokens in all).

    Raises:
        ValueError: a text or a window of less than two tokens, a window longer than the context,
            logits that are not finite, or a decoder that is divided over devices.

    Memory: 4·N·window² bytes for the logits of one layer.
    """
    ids = np.asarray(token_ids, np.int32)[:max_tokens]
    if model.parallel is not None:
        raise ValueError("calibration needs a model on one device; this one is divided")
    check_input(model.config, ids, window)
    window = min(window, ids.size)
    dtype = jnp.dtype(model.embed[...].dtype)
    windows = ids[: ids.size // window * window].reshape(-1, 1, window)
    cache = PagedKVCache.create(
        model.config, batch_size=1, max_len=-(-window // 64) * 64, page_size=64,
        dtype=dtype,
    )  # fmt: skip
    found: list[dict[str, np.ndarray]] = []
    for i, tokens in enumerate(windows):
        seen = jax.device_get(_statistics(model, jnp.asarray(tokens), cache))
        found = [_joined(*pair) for pair in zip(found, seen, strict=True)] if found else seen
        if len(found) != model.config.num_layers:
            raise ValueError(
                f"only {len(found)} of {model.config.num_layers} layers showed their attention"
            )
        if progress is not None:
            progress("calibrate", (i + 1) * window, windows.size)
    return SoftmaxCalibration(
        model=name, dtype=dtype.name, tokens=int(windows.size), window=window,
        layers=tuple(layer_softmax(statistics, dtype) for statistics in found),
    )  # fmt: skip


def check_input(config: DecoderConfig, token_ids: Sequence[int] | np.ndarray, window: int) -> None:
    """Refuse what does not suit a model, which need not be loaded for it.

    Raises:
        ValueError: as `calibrate_softmax` does.
    """
    longest = config.max_position_embeddings
    if not 2 <= window <= longest:
        raise ValueError(f"window must be 2 to {longest} tokens; got {window}")
    if len(token_ids) < 2:
        raise ValueError(f"calibration needs a text of at least 2 tokens; got {len(token_ids)}")


_BIN, _BINS = 0.25, 8192  # nats, and bins centred on 0; the outermost hold everything beyond


@jax.jit
def _statistics(model: Decoder, tokens: jax.Array, cache: PagedKVCache) -> list[dict[str, Any]]:
    """Of every layer's logits, in order."""
    found: list[dict[str, Any]] = []

    def look(**call: Any) -> None:
        found.append(logit_statistics(**call))

    with observe("attention", look):
        forward(model, tokens, cache, fresh=True)
    return found


def logit_statistics(
    *,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visibility: Visibility,
    scale: float,
    logits_softcap: float | None,
) -> dict[str, jax.Array]:
    """Of the visible logits of every query head: extremes, also of sums, and a histogram."""
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
    rows = jax.nn.logsumexp(high, axis=-1)
    blocks = jnp.pad(high, [(0, 0)] * 3 + [(0, -S % BLOCK)], constant_values=-jnp.inf)
    blocks = jax.nn.logsumexp(blocks.reshape(N, B, T, -1, BLOCK), axis=-1)
    blocks = jnp.where(blocks == -jnp.inf, jnp.inf, blocks)  # a row sees nothing of them
    place = jnp.clip(jnp.floor(logits / _BIN).astype(jnp.int32) + _BINS // 2, 0, _BINS - 1)
    count = functools.partial(jnp.bincount, length=_BINS)
    weights = jnp.broadcast_to(visible, logits.shape).reshape(N, -1).astype(jnp.int32)
    return {
        "low": low.min(axis=(1, 2, 3)), "high": high.max(axis=(1, 2, 3)),
        "sum_low": blocks.min(axis=(1, 2, 3)), "sum_high": rows.max(axis=(1, 2)),
        "histogram": jax.vmap(count)(place.reshape(N, -1), weights),
    }  # fmt: skip


def _joined(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    joins = {
        "low": np.minimum,
        "sum_low": np.minimum,
        "histogram": lambda a, b: a.astype(np.int64) + b,
    }
    return {name: joins.get(name, np.maximum)(one[name], other[name]) for name in one}


def layer_softmax(statistics: dict[str, Any], dtype: Any) -> LayerSoftmax:
    """References for a layer whose logits have these `logit_statistics`, in a model of a dtype."""
    statistics = {name: np.asarray(x, np.float64) for name, x in statistics.items()}
    least, largest = _log_limits(dtype)
    phi = (statistics["sum_low"] - least + statistics["sum_high"] - largest) / 2
    edges = (np.arange(_BINS) - _BINS // 2) * _BIN
    near = (edges >= phi[:, None] + least) & (edges + _BIN <= phi[:, None] + largest)
    counts = statistics["histogram"]
    inside = (counts * near).sum(axis=1) / counts.sum(axis=1)
    extremes = {name: statistics[name] for name in ("low", "high", "sum_low", "sum_high")}
    numbers = {"phi": phi, "inside": inside, **extremes}
    if not all(math.isfinite(x) for array in numbers.values() for x in array):
        raise ValueError("the model's attention logits are not finite")
    return LayerSoftmax(**{name: tuple(map(float, array)) for name, array in numbers.items()})


def _log_limits(dtype: Any) -> tuple[float, float]:
    """Logarithms of the least and the largest sum relative to φ that the kernel trusts."""
    least, largest = trusted_sums(dtype)
    return math.log(least), math.log(largest)
