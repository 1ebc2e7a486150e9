"""Slots in shared memory that a warp has filled by bulk copies, ahead of its work."""

import functools
from collections.abc import Sequence
from typing import Any, cast

from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import hopper
from pallas_kernels.hopper import i32
from pallas_kernels.matmul_steps import Operation

# The L2 cache's policy for what is read once; this encoding is what createpolicy gives for a fraction of 1.
EVICT_FIRST = 0x12F0000000000000


def lane_leads(thread: ir.Value) -> ir.Value:
    """1 in the first lane of each warp, else 0."""
    first = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(thread, i32(31)), i32(0))
    return arith.extui(ir.IntegerType.get_signless(32), first)


class WarpSlots:
    """Slots in shared memory that bulk copies fill, some for each warp of a block; no other warp uses them.

    Args:
      warps: of a block.
      count: slots of each warp.
      size: bytes of a slot, a multiple of 16.
    """

    def __init__(self, warps: int, count: int, size: int) -> None:
        self.warps, self.count, self.size = warps, count, size

    def _index(self, slot: ir.Value) -> ir.Value:
        return arith.addi(arith.muli(slot, i32(self.warps)), arith.shrui(utils.thread_idx(), i32(5)))

    def place(self, slots: ir.Value, slot: ir.Value) -> ir.Value:
        """The shared address of the warp's slot of that number."""
        return arith.addi(hopper.shared_address(slots), arith.muli(self._index(slot), i32(self.size)))

    def barrier(self, barriers: ir.Value, slot: ir.Value) -> ir.Value:
        """The shared address of that slot's mbarrier."""
        return arith.addi(hopper.shared_address(barriers), arith.muli(self._index(slot), i32(8)))

    def open(self) -> Operation:
        """``(barriers) -> ()``: makes the warps' barriers, which their first lanes arrive at."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=())
        def make(_: Any, barriers: Any) -> Any:
            self._make_barriers(barriers)
            return ()

        return cast(Operation, make)

    def _make_barriers(self, barriers: ir.Value) -> None:
        leads = lane_leads(utils.thread_idx())
        for slot in range(self.count):
            hopper.asm(
                "{ .reg .pred p; setp.ne.b32 p, $1, 0; @p mbarrier.init.shared.b64 [$0], 1; }",
                "r,r", [self.barrier(barriers, i32(slot)), leads], [],
            )  # fmt: skip
        hopper.asm("fence.mbarrier_init.release.cluster;", "", [], [])
        hopper.asm("fence.proxy.async.shared::cta;", "", [], [])

    def request(
        self, place: ir.Value, barrier: ir.Value, parts: Sequence[tuple[ir.Value, int, ir.Value]], wanted: ir.Value
    ) -> None:
        """Has a slot filled with parts: global address, place in the slot, and bytes, multiples of 16.

        Where ``wanted`` is 0 nothing is copied, and the barrier's phase is over at once. All lanes have read what the
        slot held before the copy may overwrite it.
        """
        total = functools.reduce(arith.addi, (size for _, _, size in parts))
        leads = lane_leads(utils.thread_idx())
        hopper.asm(
            "{ .reg .pred p; setp.ne.b32 p, $1, 0; bar.warp.sync 0xffffffff; "
            "@p mbarrier.arrive.expect_tx.shared.b64 _, [$0], $2; }",
            "r,r,r", [barrier, leads, arith.muli(total, wanted)], [],
        )  # fmt: skip
        for source, at, size in parts:
            hopper.asm(
                "{ .reg .pred p; setp.ne.b32 p, $4, 0; "
                "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                "[$0], [$1], $2, [$3], $5; }",
                "r,l,r,r,r,l",
                [
                    arith.addi(place, i32(at)), source, size, barrier, arith.andi(leads, wanted),
                    hopper.constant(EVICT_FIRST, bits=64),
                ], [],
            )  # fmt: skip
