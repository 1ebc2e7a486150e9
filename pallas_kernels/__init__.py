"""Operations of an INT4/FP8 Llama on raw arrays. Knows nothing of models or of pytrees of weights."""

from pallas_kernels.dispatch import (
    decode_attention,
    gate_quantize,
    has_hopper_gpu,
    implementations,
    int4_fp8_matmul,
    int4_fp8_matmul_tiled,
    norm_quantize,
    prefill_attention,
    quantize_rows,
)
from pallas_kernels.packing import INT4_MAX, INT4_MIN, pack_int4, unpack_int4
from pallas_kernels.reference import (
    E4M3_MAX,
    Numerics,
    dequantize_int4,
    quantize_fp8,
    quantize_kv,
    round_to_bf16,
    round_to_e4m3,
    write_rows,
)
from pallas_kernels.weight_layout import can_tile, from_tiles, to_tiles

__all__ = [
    "E4M3_MAX",
    "INT4_MAX",
    "INT4_MIN",
    "Numerics",
    "can_tile",
    "decode_attention",
    "dequantize_int4",
    "from_tiles",
    "gate_quantize",
    "has_hopper_gpu",
    "implementations",
    "int4_fp8_matmul",
    "int4_fp8_matmul_tiled",
    "norm_quantize",
    "pack_int4",
    "prefill_attention",
    "quantize_fp8",
    "quantize_kv",
    "quantize_rows",
    "round_to_bf16",
    "round_to_e4m3",
    "to_tiles",
    "unpack_int4",
    "write_rows",
]
