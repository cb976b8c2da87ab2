"""The peer outside JAX: the same weights in Hugging Face's transformers, on the same card.

Needs torch and transformers, which jaxinfer does not install. JAX must leave room for the second
copy of the weights: `XLA_PYTHON_CLIENT_MEM_FRACTION=0.5`.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.cases.peers import package
from jaxinfer.models.decoder import Decoder
from jaxinfer.pallas_kernels.dispatch import NotSupported

RUNNERS = ("hf_static", "hf_eager")
"""`generate` with a static cache, which transformers compiles, and as it comes."""

_OF_LAYER = {
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj", "gate_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}  # fmt: skip
_TOP = {"embed": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}


def _torch() -> Any:
    return package("e2e", "hf", "torch")


def torch_model(model: Decoder) -> Any:
    """A `LlamaForCausalLM` with a copy of a decoder's weights, on the same kind of device.

    Raises:
        NotSupported: the decoder is not of the Llama family, or a package is missing.
    """
    torch, transformers = _torch(), package("e2e", "hf", "transformers")
    config = model.config
    if config.family != "llama":
        raise NotSupported("e2e", "hf", f"family {config.family!r}", "llama")
    dtype = torch.bfloat16 if model.embed[...].dtype == "bfloat16" else torch.float32
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    with torch.device("meta"):
        peer = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=config.vocab_size, hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size, num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
                head_dim=config.head_dim, max_position_embeddings=config.max_position_embeddings,
                rms_norm_eps=config.rms_norm_eps, tie_word_embeddings=config.tie_embeddings,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            )
        ).to(dtype)  # fmt: skip
    peer.to_empty(device=device)
    peer.tie_weights()
    with torch.device(device):  # its buffers are computed, not loaded
        peer.model.rotary_emb = type(peer.model.rotary_emb)(peer.config)
    parameters = dict(peer.named_parameters())
    with torch.no_grad():
        for name, array in model.canonical_weights():
            target = parameters[_torch_name(name)]
            source = torch.from_dlpack(jnp.asarray(array))
            # Projections are [in, out] here and [out, in] there.
            turned = source.T if source.ndim == 2 and name != "embed" else source
            target.copy_(turned.reshape(target.shape))
    return peer.eval()


def _torch_name(name: str) -> str:
    if name in _TOP:
        return f"{_TOP[name]}.weight"
    _, layer, part = name.split(".", 2)
    return f"model.layers.{layer}.{_OF_LAYER[part]}.weight"


def logits(model: Decoder, tokens: np.ndarray) -> np.ndarray:
    """Scores `[B, V]` after the tokens `[B, T]`, of a decoder's copy."""
    torch = _torch()
    peer = torch_model(model)
    with torch.no_grad():
        given = torch.as_tensor(tokens, dtype=torch.long, device=peer.device)
        return peer(given).logits[:, -1].float().cpu().numpy()


class Generation:
    """Greedy answers by `generate`."""

    def __init__(self, model: Decoder, runner: str):
        """Copy the weights; `runner` is one of `RUNNERS`."""
        self._peer = torch_model(model)
        self._options = {"cache_implementation": "static"} if runner == "hf_static" else {}

    def seconds(self, tokens: np.ndarray, new_tokens: int) -> float:
        """Time of an answer of so many tokens to every prompt `[B, T]`."""
        torch = _torch()
        given = torch.as_tensor(tokens, dtype=torch.long, device=self._peer.device)
        start = time.perf_counter()
        answer = self._peer.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, pad_token_id=0,
            min_new_tokens=new_tokens, max_new_tokens=new_tokens, **self._options,
        )  # fmt: skip
        assert answer.shape[1] == tokens.shape[1] + new_tokens, answer.shape
        answer.cpu()
        return time.perf_counter() - start


generation = functools.lru_cache(maxsize=1)(Generation)
