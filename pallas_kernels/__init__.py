"""Ops: arrays in, arrays out, inside or outside of `jax.jit`; they depend on jax alone."""

from jaxinfer.pallas_kernels.add_rms_norm.api import add_rms_norm
from jaxinfer.pallas_kernels.attention.api import attention
from jaxinfer.pallas_kernels.attention.merge import merge_attention
from jaxinfer.pallas_kernels.decode_attention.api import decode_attention
from jaxinfer.pallas_kernels.device import DeviceSpec, current_device, use_device
from jaxinfer.pallas_kernels.dispatch import (
    Choice,
    NotSupported,
    choices,
    force_implementation,
    supported,
)
from jaxinfer.pallas_kernels.matmul.api import matmul
from jaxinfer.pallas_kernels.matmul.norm import Norm, UndividedNorm, divided
from jaxinfer.pallas_kernels.matmul.with_norm import matmul_and_norm
from jaxinfer.pallas_kernels.rope_kv_write.api import rope_kv_write
from jaxinfer.pallas_kernels.rope_kv_write.with_projection import project_rope_write

__all__ = [
    "Choice",
    "DeviceSpec",
    "Norm",
    "NotSupported",
    "UndividedNorm",
    "add_rms_norm",
    "attention",
    "choices",
    "current_device",
    "decode_attention",
    "divided",
    "force_implementation",
    "matmul",
    "matmul_and_norm",
    "merge_attention",
    "project_rope_write",
    "rope_kv_write",
    "supported",
    "use_device",
]
