"""Operations of an INT4/FP8 Llama on raw arrays. Knows nothing of models or of pytrees of weights."""

from pallas_kernels.attention import decode_attention, prefill_attention, rotate_and_append, rotate_and_round
from pallas_kernels.dispatch import has_hopper_gpu, implementations
from pallas_kernels.packing import INT4_MAX, INT4_MIN, pack_int4, unpack_int4
from pallas_kernels.products import (
    TiledWeight,
    int4_fp8_matmul,
    int4_fp8_matmul_tiled,
    int4_fp8_matmuls_tiled,
    int4_matmuls_tiled,
)
from pallas_kernels.reference import (
    E4M3_MAX,
    Numerics,
    dequantize_int4,
    quantize_fp8,
    round_to_bf16,
    round_to_e4m3,
)
from pallas_kernels.reference_rotation import (
    KEY_MAX,
    QUERY_MAX,
    apply_ropes,
    hadamard,
    quantize_blocks,
    quantize_kv,
    transpose_values,
    write_rows,
)
from pallas_kernels.rows import gate_quantize, norm_quantize, quantize_rows, round_rows
from pallas_kernels.sources import Rounded, Source, Ungated, Unnormed, Unrounded
from pallas_kernels.weight_layout import can_tile, from_tiles, to_tiles

__all__ = [
    "E4M3_MAX",
    "INT4_MAX",
    "INT4_MIN",
    "KEY_MAX",
    "QUERY_MAX",
    "Numerics",
    "Rounded",
    "Source",
    "TiledWeight",
    "Ungated",
    "Unnormed",
    "Unrounded",
    "apply_ropes",
    "can_tile",
    "decode_attention",
    "dequantize_int4",
    "from_tiles",
    "gate_quantize",
    "hadamard",
    "has_hopper_gpu",
    "implementations",
    "int4_fp8_matmul",
    "int4_fp8_matmul_tiled",
    "int4_fp8_matmuls_tiled",
    "int4_matmuls_tiled",
    "norm_quantize",
    "pack_int4",
    "prefill_attention",
    "quantize_blocks",
    "quantize_fp8",
    "quantize_kv",
    "quantize_rows",
    "rotate_and_append",
    "rotate_and_round",
    "round_rows",
    "round_to_bf16",
    "round_to_e4m3",
    "to_tiles",
    "transpose_values",
    "unpack_int4",
    "write_rows",
]
