"""Slots in shared memory that a warp has filled by bulk copies, ahead of its work."""

import functools
from collections.abc import Sequence
from typing import Any, cast

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import arithmetic, hopper
from pallas_kernels.hopper import i32
from pallas_kernels.matmul_steps import Operation

# The L2 cache's policy for what is read once; this encoding is what createpolicy gives for a fraction of 1.
EVICT_FIRST = 0x12F0000000000000


class WarpSlots:
    """Slots in shared memory that bulk copies fill, some for each warp of a block; no other warp uses them.

    Args:
      warps: of a block.
      count: slots of each warp.
      size: bytes of a slot, a multiple of 16.
    """

    def __init__(self, warps: int, count: int, size: int) -> None:
        self.warps, self.count, self.size = warps, count, size
        self.warp_layout, self.warp_type = hopper.container_layout(2), hopper.container_type(2, jnp.int32)

    def warp(self) -> Operation:
        """``() -> warp``: a container of the number of a thread's warp and of an unknown zero, for other steps."""

        @plgpu.inline_mgpu(arg_types=(), return_type=self.warp_type)
        def number(_: Any) -> Any:
            return hopper.pack([hopper.warp_number(), hopper.unknown_zero()])

        return cast(Operation, number)

    def _index(self, slot: ir.Value, warp: ir.Value) -> ir.Value:
        return arith.addi(arith.muli(slot, i32(self.warps)), warp)

    def place(self, slots: ir.Value, slot: ir.Value, warp: ir.Value) -> ir.Value:
        """The shared address of a warp's slot of that number."""
        return arith.addi(hopper.shared_address(slots), arith.muli(self._index(slot, warp), i32(self.size)))

    def barrier(self, barriers: ir.Value, slot: ir.Value, warp: ir.Value) -> ir.Value:
        """The shared address of that slot's mbarrier."""
        return arith.addi(hopper.shared_address(barriers), arith.muli(self._index(slot, warp), i32(8)))

    def open(self) -> Operation:
        """``(barriers) -> ()``: makes the warps' barriers, which a lane of each arrives at."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=())
        def make(_: Any, barriers: Any) -> Any:
            self._make_barriers(barriers)
            return ()

        return cast(Operation, make)

    def _make_barriers(self, barriers: ir.Value) -> None:
        warp = arith.shrui(utils.thread_idx(), i32(5))
        for slot in range(self.count):
            hopper.asm(
                "{ .reg .pred p; elect.sync _|p, 0xffffffff; @p mbarrier.init.shared.b64 [$0], 1; }",
                "r", [self.barrier(barriers, i32(slot), warp)], [],
            )  # fmt: skip
        hopper.asm("fence.mbarrier_init.release.cluster;", "", [], [])
        hopper.asm("fence.proxy.async.shared::cta;", "", [], [])

    def request(
        self,
        place: ir.Value,
        barrier: ir.Value,
        parts: Sequence[tuple[ir.Value, int, ir.Value]],
        total: ir.Value,
        read: Sequence[ir.Value],
        unknown_zero: ir.Value,
    ) -> None:
        """Has a slot filled with parts: global address, place in the slot, and bytes, multiples of 16.

        ``total`` is the sum of their bytes, or 0: then nothing is copied, and the barrier's phase is over at once.
        ``read`` has a register of every load from the slot since it was filled. A copy may overtake loads that wait
        behind others, so it is made to need all of them.
        """
        # The lane is elected by an instruction of which the compiler knows that it elects one: else it writes a loop.
        hopper.asm(
            "{ .reg .pred p; bar.warp.sync 0xffffffff; elect.sync _|p, 0xffffffff; "
            "@p mbarrier.arrive.expect_tx.shared.b64 _, [$0], $1; }",
            "r,r", [barrier, total], [],
        )  # fmt: skip
        nothing = i32(0)
        if read:
            *others, last = read
            nothing = arithmetic.either_and(functools.reduce(arith.ori, others), last, unknown_zero)
        for source, at, size in parts:
            hopper.asm(
                "{ .reg .pred p; elect.sync _|p, 0xffffffff; setp.gt.and.s32 p, $4, $5, p; "
                "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                f"[$0+{at}], [$1], $2, [$3], $6; }}",
                "r,l,r,r,r,r,l",
                [place, source, size, barrier, total, nothing, hopper.constant(EVICT_FIRST, bits=64)], [],
            )  # fmt: skip
