"""The register-level steps that round a token's inputs inside the matvec, :mod:`pallas_kernels.mosaic_matvec`.

Every block needs all of a token's inputs anyway and puts them into its shared memory. For one token it may as well read
them before their rounding: that takes each block a microsecond, while its first weights arrive, instead of a kernel.
"""

from typing import Any, cast

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import hopper
from pallas_kernels.hopper import i32
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.matvec_steps import THREADS, Steps, in_operand_order, store_if, to_halves
from pallas_kernels.row_steps import VECTOR, gated, normalized, rounded_to_e4m3, to_floats
from pallas_kernels.sources import Source, Ungated, Unnormed
from pallas_kernels.tiling import WARPS
from pallas_kernels.weight_layout import TILE_K


class TokenSteps:
    """The steps for one kind of source; a thread has every so manieth vector of eight inputs."""

    def __init__(self, steps: Steps, source: Source) -> None:
        # Who chooses the kernel sees to that.
        assert steps.m == 1
        assert steps.cut.halves
        self.steps, self.source = steps, source
        self.sizes = [jnp.dtype(array.dtype).itemsize for array in source.arrays()]
        self.vectors = -(-steps.held * TILE_K // (VECTOR * THREADS))
        count = sum(self.vectors * VECTOR * size // 4 for size in self.sizes)
        self.layout, self.type = hopper.container_layout(count), hopper.container_type(count, jnp.int32)

    def _columns(self) -> list[ir.Value]:
        """The first input of each of a thread's vectors."""
        thread = utils.thread_idx()
        return [
            arith.muli(arith.addi(thread, i32(THREADS * vector)), i32(VECTOR)) for vector in range(self.vectors)
        ]  # fmt: skip

    def load(self) -> Operation:
        """``(*arrays of the source) -> words``: a thread's vectors of each, zeros behind the last input."""

        @plgpu.inline_mgpu(arg_types=[plgpu.RefType()] * len(self.sizes), return_type=self.type)
        def read(_: Any, *refs: Any) -> Any:
            words = []
            for ref, size in zip(refs, self.sizes, strict=True):
                for column in self._columns():
                    exists = arith.cmpi(arith.CmpIPredicate.ult, column, i32(self.steps.k))
                    address = hopper.global_address(ref, size, (column, 1))
                    for offset in range(0, VECTOR * size, 16):
                        words += hopper.load_global(4, address, exists, offset, hopper.READ_ONLY)
            return hopper.pack(words)

        return cast(Operation, read)

    def _values(self, words: list[ir.Value]) -> list[list[ir.Value]]:
        """Per array of the source, a thread's inputs in float32."""
        values = []
        for size in self.sizes:
            count = self.vectors * VECTOR * size // 4
            mine, words = words[:count], words[count:]
            values.append(to_floats(mine, size))
        return values

    def hold(self) -> Operation:
        """``(words, factors, held inputs, scratch, other scratch) -> factors``: rounds a token and holds it.

        Its scale becomes a part of the factors. Each scratch is a word of shared memory per warp.
        """
        steps = self.steps

        @plgpu.inline_mgpu(
            arg_types=(self.layout, steps.layout["factors"], *[plgpu.RefType()] * 3), return_type=steps.type["factors"]
        )
        def hold(_: Any, words: Any, factors: Any, held: Any, scratch: Any, other: Any) -> Any:
            values, *rest = self._values(hopper.unpack(words))
            if isinstance(self.source, Unnormed):
                values = normalized(values, rest[0], steps.k, self.source.eps, scratch, WARPS)
            elif isinstance(self.source, Ungated):
                values = gated(values, rest[0])
            packed, scale = rounded_to_e4m3(values, other, WARPS)
            word, target = ir.IntegerType.get_signless(32), hopper.shared_address(held)
            for column, pair in zip(self._columns(), zip(packed[::2], packed[1::2], strict=True), strict=True):
                # Of each 32 inputs, four and the four that are 16 behind them lie together in float16.
                start = arith.muli(arith.andi(column, i32(~31)), i32(2))
                start = arith.addi(start, arith.muli(arith.andi(column, i32(8)), i32(4)))
                start = arith.addi(start, arith.shrui(arith.andi(column, i32(16)), i32(1)))
                here = arith.cmpi(arith.CmpIPredicate.ult, column, i32(steps.held * TILE_K))
                for i, e4m3 in enumerate(pair):
                    place = arith.addi(target, arith.addi(start, i32(16 * i)))
                    store_if(place, 0, to_halves(in_operand_order(e4m3)), arith.extui(word, here))
            of_weights = hopper.unpack(factors)[steps.results :]
            return hopper.pack([scale] * steps.results + of_weights)

        return cast(Operation, hold)
