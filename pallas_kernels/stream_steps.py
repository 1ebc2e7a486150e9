"""Steps by which blocks of the matmul add up their sums through global memory (stream-K, arXiv 2301.03598)."""

from collections.abc import Sequence
from typing import Any, cast

from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import hopper
from pallas_kernels.hopper import i32
from pallas_kernels.matmul_steps import Operation, Steps, by_row
from pallas_kernels.weight_layout import TILE_N


class Exchange:
    """The steps for the products of ``ops``; a warpgroup's place is its number among those of all blocks."""

    def __init__(self, ops: Steps) -> None:
        self.ops = ops
        self.layout, self.type = ops.layout["accumulator"], ops.type["accumulator"]

    def _address(self, sums: Any, place: Any) -> ir.Value:
        """Where a thread's first four registers of a warpgroup's sums are."""
        words = self.ops.tiling.tokens * TILE_N
        return hopper.global_address(sums, 4, (place.registers.item(), words), (hopper.thread_in_warpgroup(), 4))

    def _offset(self, half: int, register: int) -> int:
        return (half * self.ops.registers + register) * 4 * hopper.WARPGROUP

    def send(self) -> Operation:
        """``(place, scales, sums, *accumulators) -> ()``: writes sums in units of 1."""

        @plgpu.inline_mgpu(
            arg_types=(
                self.ops.scalar, self.ops.layout["pair"], plgpu.RefType(), *[self.layout] * self.ops.tiling.halves,
            ),
            return_type=(),
        )  # fmt: skip
        def write(_: Any, place: Any, scales: Any, sums: Any, *accumulators: Any) -> Any:
            address = self._address(sums, place)
            for half, accumulator in enumerate(accumulators):
                registers = by_row(hopper.unpack(accumulator), hopper.unpack(scales))
                for i in range(0, len(registers), 4):
                    hopper.asm(
                        f"st.global.v4.f32 [$0+{self._offset(half, i)}], {{$1, $2, $3, $4}};",
                        "l,f,f,f,f", [address, *registers[i : i + 4]], [],
                    )  # fmt: skip
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
        """``(scales, *accumulators) -> accumulators``: sums in units of 1."""

        @plgpu.inline_mgpu(
            arg_types=(self.ops.layout["pair"], *[self.layout] * self.ops.tiling.halves), return_type=self._types()
        )
        def scale(_: Any, scales: Any, *accumulators: Any) -> Any:
            return self._packed([by_row(hopper.unpack(a), hopper.unpack(scales)) for a in accumulators])

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
        """``(place, end, sums, *accumulators) -> accumulators``: adds the sums of ``count`` warpgroups, if there are.

        They are those of every ``sides``-th place before ``end``, and are loaded at once.
        """
        sides = self.ops.tiling.sides

        @plgpu.inline_mgpu(
            arg_types=(
                self.ops.scalar, self.ops.scalar, plgpu.RefType(), *[self.layout] * self.ops.tiling.halves,
            ),
            return_type=self._types(),
        )  # fmt: skip
        def read(_: Any, place: Any, end: Any, sums: Any, *accumulators: Any) -> Any:
            address, totals = self._address(sums, place), []
            apart = sides * self.ops.tiling.tokens * TILE_N * 4
            exist = [
                arith.cmpi(
                    arith.CmpIPredicate.slt, arith.addi(place.registers.item(), i32(sides * i)), end.registers.item()
                )
                for i in range(count)
            ]
            for half, accumulator in enumerate(accumulators):
                registers = list(hopper.unpack(accumulator))
                loaded = [
                    [
                        word
                        for i in range(0, len(registers), 4)
                        for word in hopper.load_global(4, address, exists, sender * apart + self._offset(half, i))
                    ]
                    for sender, exists in enumerate(exist)
                ]
                for words in loaded:
                    registers = [
                        arith.addf(r, arith.bitcast(ir.F32Type.get(), w)) for r, w in zip(registers, words, strict=True)
                    ]
                totals.append(registers)
            return self._packed(totals)

        return cast(Operation, read)

    def _types(self) -> Any:
        return (self.type,) * self.ops.tiling.halves

    def _packed(self, registers: Sequence[Sequence[ir.Value]]) -> Any:
        return tuple(map(hopper.pack, registers))
