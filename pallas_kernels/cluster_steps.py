"""Steps by which blocks of a cluster, and teams of a block, add up their sums of the matmul in shared memory."""

from collections.abc import Sequence
from typing import Any, cast

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import hopper
from pallas_kernels.hopper import i32
from pallas_kernels.matmul_steps import Operation, Steps, by_row


class ClusterSums:
    """The steps for the products of ``ops``."""

    def __init__(self, ops: Steps) -> None:
        t = self.tiling = ops.tiling
        self.layout, self.type, self.scalar, self.swizzle = ops.layout, ops.type, ops.scalar, ops.swizzle
        self.registers = ops.registers
        self.part_registers = t.tokens // t.share // 2  # of a divided tile, for each of a cluster's blocks
        self.part_bytes = t.tokens // t.share * t.outputs * 4
        self.part_type = hopper.container_type(self.part_registers, jnp.float32)

    def meet(self) -> Operation:
        """``(side) -> ()``: waits for that warpgroup of each team, with a barrier that nothing else uses."""

        @plgpu.inline_mgpu(arg_types=(self.scalar,), return_type=())
        def wait(_: Any, side: Any) -> Any:
            barrier = arith.addi(side.registers.item(), i32(hopper.FREE_BARRIER))
            hopper.asm(f"bar.sync $0, {self.tiling.teams * hopper.WARPGROUP};", "r", [barrier], [])
            return ()

        return cast(Operation, wait)

    def open_landing(self) -> Operation:
        """``(landing) -> ()``: makes the barrier at which other blocks' sums land, and announces their bytes."""
        t = self.tiling
        size = (t.split - 1) * t.tokens * t.outputs * 4 if t.split > 1 else (t.share - 1) * self.part_bytes

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=())
        def make(_: Any, landing: Any) -> Any:
            first = arith.cmpi(arith.CmpIPredicate.eq, utils.thread_idx(), i32(0))
            hopper.asm(
                "{ .reg .pred p; setp.ne.b32 p, $1, 0; @p mbarrier.init.shared.b64 [$0], 1; "
                f"@p mbarrier.arrive.expect_tx.shared.b64 _, [$0], {size}; }}", "r,r",
                [hopper.shared_address(landing), arith.extui(ir.IntegerType.get_signless(32), first)], [],
            )  # fmt: skip
            hopper.asm("fence.mbarrier_init.release.cluster;", "", [], [])
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
        """``(accumulator, scales, received, [landing]) -> ()``: a sum, to the cluster's first block or in this one."""

        @plgpu.inline_mgpu(
            arg_types=(
                self.layout["accumulator"], self.layout["pair"], plgpu.RefType(),
                *[plgpu.RefType()] * (not within_block),
            ),
            return_type=(),
        )  # fmt: skip
        def write(_: Any, accumulator: Any, scales: Any, received: Any, *landing: Any) -> Any:
            registers = by_row(hopper.unpack(accumulator), hopper.unpack(scales))
            address = arith.muli(hopper.thread_in_warpgroup(), i32(16))
            address = arith.addi(hopper.shared_address(received), address)
            barrier = None
            if landing:
                barrier = hopper.in_block(hopper.shared_address(landing[0]), i32(0))
                address = hopper.in_block(address, i32(0))
            for i in range(0, self.registers, 4):
                offset, four = (half * self.registers + i) * 512, registers[i : i + 4]
                if barrier is None:
                    hopper.store_shared(address, four, offset)
                else:
                    hopper.send_floats(address, offset, four, barrier)
            return ()

        return cast(Operation, write)

    def gather(self, half: int, senders: int) -> Operation:
        """``(accumulator, scales, received) -> accumulator``: adds what the others sent, in their order."""

        @plgpu.inline_mgpu(
            arg_types=(self.layout["accumulator"], self.layout["pair"], plgpu.RefType()),
            return_type=self.type["accumulator"],
        )
        def read(_: Any, accumulator: Any, scales: Any, received: Any) -> Any:
            registers = by_row(hopper.unpack(accumulator), hopper.unpack(scales))
            address = arith.muli(hopper.thread_in_warpgroup(), i32(16))
            address = arith.addi(hopper.shared_address(received), address)
            apart, offset = self.tiling.tokens * self.tiling.outputs * 4, half * self.registers * 512
            registers = self._add_received(registers, address, senders, apart, offset)
            return hopper.pack(registers)

        return cast(Operation, read)

    def _part(self, accumulators: Sequence[Any], scales: Any, number: ir.Value) -> list[ir.Value]:
        """A divided tile's sums of the tokens that the block of this number in the cluster adds up."""
        registers = [register for accumulator in accumulators for register in hopper.unpack(accumulator)]
        picked = registers[: self.part_registers]
        for other in range(1, self.tiling.share):
            here = arith.cmpi(arith.CmpIPredicate.eq, number, i32(other))
            candidates = registers[other * self.part_registers : (other + 1) * self.part_registers]
            picked = [arith.select(here, a, b) for a, b in zip(candidates, picked, strict=True)]
        return by_row(picked, hopper.unpack(scales))

    def _landing_place(self, stages: Any, side: Any) -> ir.Value:
        """Where the first sender's sums for this thread land, in the place of the steps' inputs."""
        address = arith.addi(
            arith.muli(hopper.thread_in_warpgroup(), i32(16)),
            arith.muli(side.registers.item(), i32(self.part_bytes // self.tiling.sides)),
        )
        return arith.addi(hopper.shared_address(stages), address)

    def send_parts(self) -> Operation:
        """``(side, peer, scales, stages, landing, *accumulators) -> ()``: sums for the cluster's other blocks."""

        @plgpu.inline_mgpu(
            arg_types=(
                self.scalar, self.scalar, self.layout["pair"], plgpu.RefType(self.swizzle), plgpu.RefType(),
                *[self.layout["accumulator"]] * self.tiling.halves,
            ),
            return_type=(),
        )  # fmt: skip
        def write(_: Any, side: Any, peer: Any, scales: Any, stages: Any, landing: Any, *accumulators: Any) -> Any:
            place, barrier = self._landing_place(stages, side), hopper.shared_address(landing)
            for distance in range(1, self.tiling.share):
                target = arith.addi(peer.registers.item(), i32(distance))
                target = arith.andi(target, i32(self.tiling.share - 1))
                registers = self._part(accumulators, scales, target)
                address, there = hopper.in_block(place, target), hopper.in_block(barrier, target)
                for i in range(0, self.part_registers, 4):
                    hopper.send_floats(address, (distance - 1) * self.part_bytes + i * 512, registers[i : i + 4], there)
            return ()

        return cast(Operation, write)

    def gather_parts(self) -> Operation:
        """``(side, peer, scales, stages, *accumulators) -> accumulator``: this block's part of the cluster's sums."""

        @plgpu.inline_mgpu(
            arg_types=(
                self.scalar, self.scalar, self.layout["pair"], plgpu.RefType(self.swizzle),
                *[self.layout["accumulator"]] * self.tiling.halves,
            ),
            return_type=self.part_type,
        )  # fmt: skip
        def read(_: Any, side: Any, peer: Any, scales: Any, stages: Any, *accumulators: Any) -> Any:
            registers = self._part(accumulators, scales, peer.registers.item())
            place = self._landing_place(stages, side)
            return hopper.pack(self._add_received(registers, place, self.tiling.share - 1, self.part_bytes))

        return cast(Operation, read)

    def _add_received(
        self, registers: list[ir.Value], address: ir.Value, senders: int, apart: int, offset: int = 0
    ) -> list[ir.Value]:
        """Sums and those of the same thread of other blocks or teams, which lie ``apart`` bytes from one another."""
        for sender in range(senders):
            for i in range(0, len(registers), 4):
                part = hopper.asm(
                    f"ld.shared.v4.f32 {{$0, $1, $2, $3}}, [$4+{sender * apart + offset + i * 512}];",
                    "=f,=f,=f,=f,r", [address], [ir.F32Type.get()] * 4,
                )  # fmt: skip
                registers[i : i + 4] = [arith.addf(a, b) for a, b in zip(registers[i : i + 4], part, strict=True)]
        return registers
