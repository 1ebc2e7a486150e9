"""The INT4 x FP8 matrix product for Hopper, in Pallas:Mosaic GPU.

The kernel computes tiles of yᵀ: weights are the first operand of the tensor core instruction, converted from int4 to
e4m3 in registers, and activations the second, read from shared memory. So it serves one token and many thousands.
``docs/kernels.md`` says what was tried and measured.
"""

import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.matmul_block import Block
from pallas_kernels.matmul_plan import Plan
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.reference import Numerics
from pallas_kernels.tiling import BLOCK_N, FLAGS, Tiling
from pallas_kernels.tuned import choose_tiling
from pallas_kernels.weight_layout import tile_shape


def make_kernel(plan: Plan) -> Operation:
    """The kernel for one shape: ``(x8, x_scale, *tiles, *tensor_scales [1], *biases [n] if any) -> *y [m, n]``.

    Behind ``x_scale`` comes the residual, if there is one. With ``stream_k`` there are zeros ``[FLAGS]``, int32, as the
    last argument, which the kernel writes, and sums of blocks as the last result.
    """

    def body(x: Any, x_scale: Any, *refs: Any) -> None:
        Block(plan, x, x_scale, refs).run()

    cluster_axis: dict[str, Any] = {}
    if plan.cluster > 1:
        cluster_axis = {"cluster": (plan.cluster,), "cluster_names": ("peer",)}
    kernel = plgpu.kernel(
        body,
        out_type=tuple(plan.results()),
        scratch_types=plan.scratch(),
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=plan.tiling.sides * plan.tiling.teams + 1,
        thread_name="warpgroup",
        compiler_params=hopper.COMPILER_PARAMS,
        kernel_name="int4_matmul",
        **cluster_axis,
    )
    return cast(Operation, kernel)


@functools.partial(jax.jit, static_argnames=("sizes", "group_size", "scale_dtype", "out_dtype", "numerics", "tiling"))
def matmul(
    x8: jax.Array,
    x_scale: jax.Array,
    tiles: Sequence[jax.Array],
    tensor_scales: Sequence[jax.Array],
    biases: Sequence[jax.Array | None],
    residual: jax.Array | None = None,
    flags: jax.Array | None = None,
    *,
    sizes: tuple[int, ...],
    group_size: int,
    scale_dtype: Any,
    out_dtype: Any = jnp.bfloat16,
    numerics: Numerics = "exact",
    tiling: Tiling | None = None,
) -> tuple[jax.Array, ...]:
    """``y[m, n] = x_scale[m] · tensor_scale · Σ_k x8[m, k] · W[n, k] + bias[n]`` of several W.

    Args:
      x8: ``[m, k]`` e4m3.
      x_scale: ``[m]`` float32.
      tiles: int32, per weight what :func:`pallas_kernels.weight_layout.to_tiles` makes of it.
      tensor_scales: per weight, scalar float32.
      biases: per weight ``[n]`` float, or None.
      residual: ``[m, n]`` bf16 that is added to the (rounded) product of the one weight; or None.
      flags: zeros ``[FLAGS]``, int32, that blocks may use to tell each other what is done; made here if None.
      sizes: outputs n of each weight, multiples of 64.
      group_size: 32, 64 or 128, a divisor of k.
      scale_dtype: of the group scales in ``tiles``, e4m3 or bf16.
      out_dtype: bf16, or float32 if there is no residual.
      numerics: "exact" or "folded", see :func:`pallas_kernels.reference.int4_fp8_matmul`.
      tiling: chosen by :func:`choose_tiling` if None.

    Returns:
      Per weight ``[m, n]`` of ``out_dtype``. Sums are float16 with exact e4m3 scales
      (:class:`pallas_kernels.matmul_steps.Steps` says how), and else the tensor core's accumulators, which keep fewer
      bits than float32.
    """
    m, k = x8.shape
    if tiling is None:
        rows, columns = tile_shape(group_size, scale_dtype)
        whole_blocks = sum(-(-n // BLOCK_N) * BLOCK_N for n in sizes)
        tiling = choose_tiling(m, whole_blocks, k, 4 * rows * columns)
    has_bias = any(bias is not None for bias in biases)
    has_residual = residual is not None
    kernel = make_kernel(
        Plan(
            m, sizes, k, group_size, jnp.dtype(scale_dtype), tiling,
            has_bias=has_bias, has_residual=has_residual, out_dtype=out_dtype, folded=numerics == "folded",
        )
    )  # fmt: skip
    beside = [] if residual is None else [residual]
    arrays = x8, x_scale, *beside, *tiles, *as_vectors(sizes, tensor_scales, biases)
    if not tiling.stream_k:
        return tuple(kernel(*arrays))
    flags = jnp.zeros((FLAGS,), jnp.int32) if flags is None else flags
    *products, _ = kernel(*arrays, jax.new_ref(flags))
    return tuple(products)


def as_vectors(
    sizes: Sequence[int], tensor_scales: Sequence[jax.Array], biases: Sequence[jax.Array | None]
) -> list[jax.Array]:
    """What the kernels take beside the weights: scales ``[1]`` and, if there is any bias, one ``[n]`` for each."""
    scales = [scale.reshape(1) for scale in tensor_scales]
    if all(bias is None for bias in biases):
        return scales
    zeros = [jnp.zeros((n,), jnp.float32) for n in sizes]
    return scales + [z if bias is None else bias.astype(jnp.float32) for z, bias in zip(zeros, biases, strict=True)]
