"""Copies of a block's first two steps of the matmul, where steps are copied in pairs otherwise.

An odd number of tiles is no multiple of the 128 bytes that Pallas' copies must be, hence the pairs. But the first step
need not wait for the second one's weights: bulk copies are of any 16 bytes, and a block has just two of such steps.
"""

from typing import Any, cast

from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import hopper
from pallas_kernels.hopper import i32
from pallas_kernels.matmul_steps import Operation, Steps
from pallas_kernels.weight_layout import TILE_K, TILE_N

BARRIERS = 2  # of eight bytes, one for each step's weights


class FirstPair:
    """The steps for the products of ``ops``.

    Args:
      ops: of the product.
      k: its inputs.
    """

    def __init__(self, ops: Steps, k: int) -> None:
        self.sizes, self.sides, self.scalar = ops.sizes, ops.tiling.sides, ops.scalar
        self.steps, self.tile_bytes = -(-k // TILE_K), ops.tile_bytes
        self.threads = (ops.tiling.sides + 1) * hopper.WARPGROUP

    def _barrier(self, barriers: Any, number: int) -> ir.Value:
        """The address of that of a step's weights."""
        return arith.addi(hopper.shared_address(barriers), i32(8 * number))

    def open(self) -> Operation:
        """``(barriers) -> ()``: makes them and announces each step's bytes, for all threads of the block."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=())
        def make(_: Any, barriers: Any) -> Any:
            hopper.open_barriers(hopper.shared_address(barriers), self.sides * self.tile_bytes, BARRIERS)
            hopper.asm("fence.proxy.async.shared::cta;", "", [], [])
            hopper.asm(f"bar.sync {hopper.FREE_BARRIER}, {self.threads};", "", [], [])
            return ()

        return cast(Operation, make)

    def copy(self, weight: int, number: int) -> Operation:
        """``(tiles, place of a side's pair, barriers, row, step) -> ()``: asks for a tile of that weight.

        It is the first step's, of ``number`` 0, or the second one's. Tiles beyond the last one are the last: their
        results are not written, or their inputs are zeros.
        """
        rows = -(-self.sizes[weight] // TILE_N)

        @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 3, *[self.scalar] * 2), return_type=())
        def ask(_: Any, tiles: Any, pair: Any, barriers: Any, row: Any, step: Any) -> Any:
            row, step = row.registers.item(), step.registers.item()
            row, step = arith.minui(row, i32(rows - 1)), arith.minui(step, i32(self.steps - 1))
            tile = arith.addi(arith.muli(row, i32(self.steps)), step)
            source = hopper.global_address(tiles, 1, (tile, self.tile_bytes))
            place = arith.addi(hopper.shared_address(pair), i32(number * self.tile_bytes))
            barrier = self._barrier(barriers, number)
            one = arith.cmpi(arith.CmpIPredicate.eq, hopper.thread_in_warpgroup(), i32(0))
            hopper.copy_in_bulk(place, source, self.tile_bytes, barrier, one)
            return ()

        return cast(Operation, ask)

    def wait(self, number: int) -> Operation:
        """``(barriers) -> ()``: waits for the first step's weights, or the second one's."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=())
        def wait(_: Any, barriers: Any) -> Any:
            hopper.wait_for_phase(self._barrier(barriers, number), i32(0))
            return ()

        return cast(Operation, wait)
