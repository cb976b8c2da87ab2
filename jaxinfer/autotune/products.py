"""The products of tokens and weights that a model consists of, from its configuration alone."""

from collections.abc import Callable

from jaxinfer.hub import DEFAULT, resolve_model
from jaxinfer.models.checkpoint.huggingface import read_json
from jaxinfer.models.checkpoint.huggingface_config import config_from_huggingface
from jaxinfer.models.checkpoint.open import open_checkpoint
from jaxinfer.models.checkpoint.orbax import FILE as ORBAX_FILE
from jaxinfer.models.config import DecoderConfig
from jaxinfer.pallas_kernels.matmul.config import BUCKETS
from jaxinfer.pallas_kernels.matmul.specs import MatmulSpec
from jaxinfer.progress import Progress

HEAD = "head"
PRESETS: dict[str, Callable[[], DecoderConfig]] = {
    DEFAULT: DecoderConfig.smollm2_135m,
    "llama-2-7b": DecoderConfig.llama2_7b,
    "llama-3-8b": DecoderConfig.llama3_8b,
    "smollm2-135m": DecoderConfig.smollm2_135m,
}


def model_config(name: str, progress: Progress | None = None) -> DecoderConfig:
    """The shape of a model; its weights are neither read nor, from a repository, fetched.

    Args:
        name: One of `PRESETS`, or as for `hub.resolve_model`.
        progress: Called with (title, bytes fetched, bytes in all) while downloading.

    Raises:
        CheckpointError: no such model, or its files are damaged.
        UnsupportedModelError: the model is of a kind that is not implemented.
        DownloadError: the files cannot be fetched.
    """
    if name in PRESETS:
        return PRESETS[name]()
    path = resolve_model(name, progress, config_only=True)
    file = path / "config.json"
    if file.is_file() and not (path / ORBAX_FILE).exists():
        return config_from_huggingface(read_json(file), str(file))
    return open_checkpoint(path).config


def products(config: DecoderConfig, *, name: str, dtype: str) -> list[MatmulSpec]:
    """What a decoder asks of `matmul`, at every number of tokens that is measured.

    All layers are alike. The output head, `HEAD`, comes once per model.

    Args:
        config: The model's shape.
        name: Of the model, for messages.
        dtype: Of weights and tokens.
    """
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    heads = config.num_heads * H
    qkv = heads + 2 * config.num_kv_heads * H
    return [
        spec
        for M in BUCKETS
        for spec in (
            MatmulSpec(model=name, part="qkv", M=M, K=D, N=qkv, bias=config.qkv_bias, dtype=dtype),
            MatmulSpec(model=name, part="o", M=M, K=heads, N=D, dtype=dtype),
            MatmulSpec(
                model=name, part="gate_up", M=M, K=D, N=2 * F, gate=config.activation, dtype=dtype
            ),
            MatmulSpec(model=name, part="down", M=M, K=F, N=D, dtype=dtype),
            MatmulSpec(
                model=name,
                part=HEAD,
                M=M,
                K=D,
                N=config.vocab_size,
                dtype=dtype,
                cast=True,
                transposed=config.tie_embeddings,
            ),
        )
    ]
