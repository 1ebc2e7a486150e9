"""Steps by which blocks of the matmul add up their sums through global memory (stream-K, arXiv 2301.03598)."""

from collections.abc import Sequence
from typing import Any, cast

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import hopper
from pallas_kernels.hopper import i32
from pallas_kernels.matmul_steps import Operation, Steps
from pallas_kernels.sums_layout import bytes_of_half, place_of_thread, vectors


class Exchange:
    """The steps for the products of ``ops``; a warpgroup's place is its number among those of all blocks."""

    def __init__(self, ops: Steps) -> None:
        self.ops, self.layout, self.type = ops, ops.layout[ops.kind], ops.type[ops.kind]
        self.bytes_of_warpgroup = ops.tiling.halves * bytes_of_half(ops.registers)

    def results(self, blocks: int) -> jax.ShapeDtypeStruct:
        """What so many blocks write."""
        return jax.ShapeDtypeStruct((blocks * self.ops.tiling.sides, self.bytes_of_warpgroup // 4), self.type.dtype)

    def _address(self, written: Any, place: Any) -> ir.Value:
        """Where a thread's first registers of a warpgroup's sums are."""
        mine = place_of_thread(self.ops.registers)
        return hopper.global_address(written, 1, (place.registers.item(), self.bytes_of_warpgroup), (mine, 1))

    def send(self) -> Operation:
        """``(place, scales, written, *sums) -> ()``: writes sums, in units that all blocks have."""

        @plgpu.inline_mgpu(
            arg_types=(
                self.ops.scalar, self.ops.layout["pair"], plgpu.RefType(), *[self.layout] * self.ops.tiling.halves,
            ),
            return_type=(),
        )  # fmt: skip
        def write(_: Any, place: Any, scales: Any, written: Any, *sums: Any) -> Any:
            address = self._address(written, place)
            for half, mine in enumerate(sums):
                for offset, registers in vectors(self.ops.to_send(mine, scales)):
                    hopper.store_global(address, registers, half * bytes_of_half(self.ops.registers) + offset)
            return ()

        return cast(Operation, write)

    def announce(self) -> Operation:
        """``(place, flags) -> ()``: tells that what all threads of the warpgroup wrote before a barrier is there."""

        @plgpu.inline_mgpu(arg_types=(self.ops.scalar, plgpu.RefType()), return_type=())
        def tell(_: Any, place: Any, flags: Any) -> Any:
            first = arith.cmpi(arith.CmpIPredicate.eq, hopper.thread_in_warpgroup(), i32(0))
            hopper.asm(
                "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.release.gpu.global.b32 [$0], $1; }", "l,r,r",
                [self._flag(flags, place), i32(1), arith.extui(ir.IntegerType.get_signless(32), first)], [],
            )  # fmt: skip
            return ()

        return cast(Operation, tell)

    def _flag(self, flags: Any, place: Any) -> ir.Value:
        return hopper.global_address(flags, 4, (place.registers.item(), 1))

    def to_units(self) -> Operation:
        """``(scales, *sums) -> sums``: in units that all blocks have."""

        @plgpu.inline_mgpu(
            arg_types=(self.ops.layout["pair"], *[self.layout] * self.ops.tiling.halves), return_type=self._types()
        )
        def scale(_: Any, scales: Any, *sums: Any) -> Any:
            return self._packed([self.ops.in_common_units(half, scales) for half in sums])

        return cast(Operation, scale)

    def wait(self) -> Operation:
        """``(place, end, flags) -> ()``: until the sums of every ``sides``-th place before ``end`` are there.

        Each lane waits for one of at most 32.
        """

        @plgpu.inline_mgpu(arg_types=(self.ops.scalar, self.ops.scalar, plgpu.RefType()), return_type=())
        def wait(_: Any, place: Any, end: Any, flags: Any) -> Any:
            lane = arith.andi(hopper.thread_in_warpgroup(), i32(31))
            mine = arith.addi(place.registers.item(), arith.muli(lane, i32(self.ops.tiling.sides)))
            exists = arith.cmpi(arith.CmpIPredicate.slt, mine, end.registers.item())
            hopper.asm(
                "{ .reg .pred p, q; .reg .b32 flag; setp.ne.b32 q, $1, 0; mov.b32 flag, 1; "
                "again: @q ld.acquire.gpu.global.b32 flag, [$0]; setp.ne.b32 p, flag, 0; @!p bra again; }", "l,r",
                [hopper.global_address(flags, 4, (mine, 1)), arith.extui(ir.IntegerType.get_signless(32), exists)], [],
            )  # fmt: skip
            hopper.asm("bar.warp.sync 0xffffffff;", "", [], [])
            return ()

        return cast(Operation, wait)

    def add(self, count: int) -> Operation:
        """``(place, end, written, *sums) -> sums``: adds those of ``count`` warpgroups, if there are.

        They are those of every ``sides``-th place before ``end``, and are loaded at once.
        """
        sides = self.ops.tiling.sides

        @plgpu.inline_mgpu(
            arg_types=(
                self.ops.scalar, self.ops.scalar, plgpu.RefType(), *[self.layout] * self.ops.tiling.halves,
            ),
            return_type=self._types(),
        )  # fmt: skip
        def read(_: Any, place: Any, end: Any, written: Any, *sums: Any) -> Any:
            address, totals = self._address(written, place), []
            apart, of_half = sides * self.bytes_of_warpgroup, bytes_of_half(self.ops.registers)
            exist = [
                arith.cmpi(
                    arith.CmpIPredicate.slt, arith.addi(place.registers.item(), i32(sides * i)), end.registers.item()
                )
                for i in range(count)
            ]
            for half, mine in enumerate(sums):
                registers = hopper.unpack(mine)
                loaded = [
                    [
                        word
                        for offset, those in vectors(registers)
                        for word in hopper.load_global(
                            len(those), address, exists, sender * apart + half * of_half + offset
                        )
                    ]
                    for sender, exists in enumerate(exist)
                ]
                for words in loaded:
                    theirs = [arith.bitcast(registers[0].type, word) for word in words]
                    registers = self.ops.add_sums(registers, theirs)
                totals.append(registers)
            return self._packed(totals)

        return cast(Operation, read)

    def _types(self) -> Any:
        return (self.type,) * self.ops.tiling.halves

    def _packed(self, registers: Sequence[Sequence[ir.Value]]) -> Any:
        return tuple(map(hopper.pack, registers))
