"""The ops that are measured, by name."""

from typing import Any

from jaxinfer.autotune.decode_attention import DecodeAttention
from jaxinfer.autotune.matmul import Matmul
from jaxinfer.autotune.op import Op

OPS: dict[str, Op[Any, Any]] = {op.name: op for op in (Matmul(), DecodeAttention())}
