"""Steps by which blocks of a cluster, and teams of a block, add up their sums of the matmul in shared memory."""

from collections.abc import Sequence
from typing import Any, cast

from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import hopper
from pallas_kernels.hopper import i32
from pallas_kernels.matmul_steps import Operation, Steps
from pallas_kernels.sums_layout import bytes_of_half, place_of_thread, vectors
from pallas_kernels.tiling import SHARED_MEMORY


def _store_or_send(
    address: ir.Value, offset: int, registers: Sequence[ir.Value], barrier: ir.Value | None
) -> None:  # fmt: skip
    """To this block's shared memory; or, if there is a barrier, to that of the cluster."""
    if barrier is None:
        hopper.store_shared(address, registers, offset)
    else:
        hopper.send_words(address, offset, registers, barrier)


class ClusterSums:
    """The steps for the products of ``ops``.

    Attributes:
      apart: whether sums land in room of their own, not where the steps' inputs were.
    """

    def __init__(self, ops: Steps) -> None:
        t, self.ops = ops.tiling, ops
        self.tiling, self.scalar, self.swizzle = t, ops.scalar, ops.swizzle
        self.layout, self.type = ops.layout[ops.kind], ops.type[ops.kind]
        # Of a tile whose sums several bring together, each of a part.
        self.parts, self.teams = t.tokens // t.part, t.teams if t.divides_sums else 1
        self.part_registers = ops.registers * t.halves // self.parts
        self.part_bytes = t.sides * bytes_of_half(self.part_registers)
        self.part_type = hopper.container_type(self.part_registers, self.type.dtype)
        self.landing_bytes = self.teams * (self.parts - 1) * self.part_bytes  # of a block
        self.apart = t.divides_sums and t.shared_memory(ops.tile_bytes) + self.landing_bytes <= SHARED_MEMORY
        self.room_type = plgpu.RefType(() if self.apart else self.swizzle)

    def meet(self) -> Operation:
        """``(side) -> ()``: waits for that warpgroup of each team, with a barrier that nothing else uses."""

        @plgpu.inline_mgpu(arg_types=(self.scalar,), return_type=())
        def wait(_: Any, side: Any) -> Any:
            barrier = arith.addi(side.registers.item(), i32(hopper.FREE_BARRIER))
            hopper.asm(f"bar.sync $0, {self.tiling.teams * hopper.WARPGROUP};", "r", [barrier], [])
            return ()

        return cast(Operation, wait)

    def meet_all(self) -> Operation:
        """``() -> ()``: waits for all computing warpgroups of the block."""

        @plgpu.inline_mgpu(arg_types=(), return_type=())
        def wait(_: Any) -> Any:
            threads = self.tiling.teams * self.tiling.sides * hopper.WARPGROUP
            hopper.asm(f"bar.sync {hopper.FREE_BARRIER}, {threads};", "", [], [])
            return ()

        return cast(Operation, wait)

    def open_landing(self) -> Operation:
        """``(landing) -> ()``: makes the barrier at which other blocks' sums land, and announces their bytes."""
        t = self.tiling
        size = self.landing_bytes
        if not t.divides_sums and t.split > 1:
            size = (t.split - 1) * t.sides * t.halves * bytes_of_half(self.ops.registers)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=())
        def make(_: Any, landing: Any) -> Any:
            hopper.open_barriers(hopper.shared_address(landing), size)
            return ()

        return cast(Operation, make)

    def await_landing(self) -> Operation:
        """``(landing) -> ()``: waits for the other blocks' sums."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=())
        def wait(_: Any, landing: Any) -> Any:
            hopper.wait_for_phase(hopper.shared_address(landing), i32(0))
            return ()

        return cast(Operation, wait)

    def send(self, half: int, within_block: bool = False) -> Operation:
        """``(sums, scales, received, [landing]) -> ()``: a half's, to the cluster's first block or in this one."""

        @plgpu.inline_mgpu(
            arg_types=(
                self.layout, self.ops.layout["pair"], plgpu.RefType(), *[plgpu.RefType()] * (not within_block),
            ),
            return_type=(),
        )  # fmt: skip
        def write(_: Any, sums: Any, scales: Any, received: Any, *landing: Any) -> Any:
            address = arith.addi(hopper.shared_address(received), place_of_thread(self.ops.registers))
            barrier = None
            if landing:
                barrier = hopper.in_block(hopper.shared_address(landing[0]), i32(0))
                address = hopper.in_block(address, i32(0))
            for offset, registers in vectors(self.ops.to_send(sums, scales)):
                _store_or_send(address, half * bytes_of_half(self.ops.registers) + offset, registers, barrier)
            return ()

        return cast(Operation, write)

    def gather(self, half: int, senders: int) -> Operation:
        """``(sums, scales, received) -> sums``: adds a half's that the others sent, in their order."""

        @plgpu.inline_mgpu(
            arg_types=(self.layout, self.ops.layout["pair"], plgpu.RefType()), return_type=self.type
        )  # fmt: skip
        def read(_: Any, sums: Any, scales: Any, received: Any) -> Any:
            registers = self.ops.in_common_units(sums, scales)
            address = arith.addi(hopper.shared_address(received), place_of_thread(self.ops.registers))
            of_half = bytes_of_half(self.ops.registers)
            apart = self.tiling.sides * self.tiling.halves * of_half
            return hopper.pack(self._add_received(registers, address, senders, apart, half * of_half))

        return cast(Operation, read)

    def _part(self, registers: Sequence[ir.Value], number: ir.Value) -> Sequence[ir.Value]:
        """A tile's sums of the tokens of that part."""
        picked = registers[: self.part_registers]
        for other in range(1, self.parts):
            here = arith.cmpi(arith.CmpIPredicate.eq, number, i32(other))
            candidates = registers[other * self.part_registers : (other + 1) * self.part_registers]
            picked = [arith.select(here, a, b) for a, b in zip(candidates, picked, strict=True)]
        return picked

    def _landing_place(self, room: Any, side: Any, part: ir.Value) -> ir.Value:
        """Where the first sender's sums of a part land in the block that writes it, for the thread with this number."""
        address = arith.muli(side.registers.item(), i32(bytes_of_half(self.part_registers)))
        address = arith.addi(address, place_of_thread(self.part_registers))
        if self.teams > 1:
            team = arith.andi(part, i32(self.teams - 1))
            address = arith.addi(address, arith.muli(team, i32((self.parts - 1) * self.part_bytes)))
        return arith.addi(hopper.shared_address(room), address)

    def _block_of(self, part: ir.Value) -> ir.Value:
        """The number in the cluster of the block that writes a part."""
        return arith.shrui(part, i32(self.teams.bit_length() - 1)) if self.teams > 1 else part

    def send_parts(self) -> Operation:
        """``(side, part, scales, room, *sums, [landing]) -> ()``: a tile's sums, for those who write other parts.

        Where a block is alone, it has no ``landing``, and its warpgroups meet before they read.
        """
        halves, clustered = self.tiling.halves, self.tiling.split * self.tiling.share > 1

        @plgpu.inline_mgpu(
            arg_types=(
                self.scalar, self.scalar, self.ops.layout["pair"], self.room_type,
                *[self.layout] * halves, *[plgpu.RefType()] * clustered,
            ),
            return_type=(),
        )  # fmt: skip
        def write(_: Any, side: Any, part: Any, scales: Any, room: Any, *rest: Any) -> Any:
            to_send = [register for half in rest[:halves] for register in self.ops.to_send(half, scales)]
            for distance in range(1, self.parts):
                target = arith.addi(part.registers.item(), i32(distance))
                target = arith.andi(target, i32(self.parts - 1))
                address, barrier = self._landing_place(room, side, target), None
                if clustered:
                    block = self._block_of(target)
                    address = hopper.in_block(address, block)
                    barrier = hopper.in_block(hopper.shared_address(rest[-1]), block)
                for offset, registers in vectors(self._part(to_send, target)):
                    offset += (distance - 1) * self.part_bytes
                    _store_or_send(address, offset, registers, barrier)
            return ()

        return cast(Operation, write)

    def gather_parts(self) -> Operation:
        """``(side, part, scales, room, *sums) -> sums``: all sums of the part, this warpgroup's among them."""

        @plgpu.inline_mgpu(
            arg_types=(
                self.scalar, self.scalar, self.ops.layout["pair"], self.room_type,
                *[self.layout] * self.tiling.halves,
            ),
            return_type=self.part_type,
        )  # fmt: skip
        def read(_: Any, side: Any, part: Any, scales: Any, room: Any, *sums: Any) -> Any:
            of_tile = [register for half in sums for register in self.ops.in_common_units(half, scales)]
            registers = self._part(of_tile, part.registers.item())
            place = self._landing_place(room, side, part.registers.item())
            return hopper.pack(self._add_received(registers, place, self.parts - 1, self.part_bytes))

        return cast(Operation, read)

    def _add_received(
        self, registers: Sequence[ir.Value], address: ir.Value, senders: int, apart: int, offset: int = 0
    ) -> Sequence[ir.Value]:
        """Sums and those of the same thread of other blocks or teams, which lie ``apart`` bytes from one another."""
        for sender in range(senders):
            totals = []
            for place, mine in vectors(registers):
                words = hopper.load_shared(address, sender * apart + offset + place, len(mine))
                totals += self.ops.add_sums(mine, [arith.bitcast(mine[0].type, word) for word in words])
            registers = totals
        return registers
