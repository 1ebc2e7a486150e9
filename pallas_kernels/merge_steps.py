"""How decode attention's partial results are merged: those of a block's warps, and those of a sequence's splits."""

import functools
from collections.abc import Sequence
from typing import Any, cast

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import arithmetic, hopper
from pallas_kernels.decode_steps import LOWEST, MASKED, ROWS, Steps, integer, lane_parts, load_once
from pallas_kernels.hopper import f32, i32
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.row_steps import to_floats

AT_ONCE = 16  # splits whose results are on their way together


class MergeSteps:
    """The register-level steps for one shape; results in ``out_dtype``, bf16 or float32."""

    def __init__(self, steps: Steps, out_dtype: Any) -> None:
        self.steps, self.shape, self.out_dtype = steps, steps.shape, jnp.dtype(out_dtype)
        self.row = hopper.container_layout(3)
        self.row_type = hopper.container_type(3, jnp.float32)

    def start(self) -> Operation:
        """``zeros -> state`` of a row of which no split has been collected; the maximum comes first."""

        @plgpu.inline_mgpu(arg_types=(self.row,), return_type=self.row_type)
        def begin(_: Any, zeros: Any) -> Any:
            return hopper.pack([f32(LOWEST), *hopper.unpack(zeros)[1:]])

        return cast(Operation, begin)

    def merge_warps(self) -> Operation:
        """``(state, shared, results, number, sequence, kv head) -> ()``: the warps' results as one, to memory.

        Results are ``y`` if there is but one split; the parts that a block of a cluster is to merge, in its shared
        memory, with the number of this block's split; or else those of all splits, float32 ``[blocks, rows, pitch]``,
        with this block's number.
        """
        s = self.shape
        d, pitch = s.head_dim, s.pitch

        @plgpu.inline_mgpu(
            arg_types=(self.steps.layout["state"], plgpu.RefType(), plgpu.RefType(), *[self.steps.scalar] * 3),
            return_type=(),
        )
        def write(_: Any, state: Any, shared: Any, results: Any, *where: Any) -> Any:
            number, sequence, kv_head = (x.registers.item() for x in where)
            g, t, warp = lane_parts()
            registers = hopper.unpack(state)
            base = hopper.shared_address(shared)
            hopper.block_barrier()  # all warps have read their last tiles, where results go
            size = 4 + self.steps.outputs
            for n in range(s.row_blocks):
                for column in range(2):
                    largest, total = registers[size * n + column : size * n + 4 : 2]
                    total = hopper.across_lanes(total, arith.addf, lanes=8, apart=4)
                    row = arith.addi(arith.muli(t, i32(2)), i32(ROWS * n + column))
                    row = arith.addi(arith.muli(warp, i32(s.row_blocks * ROWS)), row)
                    place = arith.addi(base, arith.muli(row, i32(4 * pitch)))
                    hopper.store_shared(place, [largest, total], 4 * d)
                    # A lane's outputs are neighbours in the head.
                    place = arith.addi(place, arith.muli(g, i32(4 * (d // 8))))
                    mine = [registers[size * n + 4 + i] for i in range(column, self.steps.outputs, 2)]
                    for i in range(0, len(mine), 4):
                        hopper.store_shared(place, mine[i : i + 4], 4 * i)
            hopper.block_barrier()
            thread = utils.thread_idx()
            # Thread i takes element i of every row it reaches.
            rows_at_once = 32 * s.cut.warps // d
            element, first_row = arith.andi(thread, i32(d - 1)), arith.divui(thread, i32(d))

            for i in range(0, s.rows, rows_at_once):
                row = arith.addi(first_row, i32(i))
                at = arith.addi(base, arith.muli(row, i32(4 * pitch)))
                largest, total, out = self._of_shared_parts(at, element, s.cut.warps, 4 * pitch * s.row_blocks * ROWS)
                exists = arith.cmpi(arith.CmpIPredicate.ult, row, i32(s.rows))
                if s.cut.splits == 1:
                    self._store_result(results, sequence, kv_head, row, element, out, total, exists)
                    continue
                if s.cut.clustered:
                    target = self._place_of_part(results, row, number)
                else:
                    target = hopper.global_address(results, 4, (number, s.rows * pitch), (row, pitch))
                self._store_part(target, element, out, largest, total, exists)
            return ()

        return cast(Operation, write)

    @property
    def rows_of_block(self) -> int:
        """Query rows whose parts a block of a cluster merges, at most: every so manieth row is one block's."""
        return -(-self.shape.rows // self.shape.cut.splits)

    @property
    def words_of_parts(self) -> int:
        """Of shared memory, for the parts of these rows."""
        return self.rows_of_block * self.shape.cut.splits * self.shape.pitch

    def _place_of_part(self, parts: Any, row: ir.Value, split: ir.Value) -> ir.Value:
        """The address in the cluster at which the block that merges a row has a split's part of it."""
        splits = i32(self.shape.cut.splits)
        first = self._first_part(parts, arith.divui(row, splits))
        address = arith.addi(first, arith.muli(split, i32(4 * self.shape.pitch)))
        return hopper.in_block(address, arith.remui(row, splits))

    def _first_part(self, parts: Any, number: ir.Value) -> ir.Value:
        """The shared address of the first split's part of a block's row of that number."""
        bytes_of_row = i32(4 * self.shape.cut.splits * self.shape.pitch)
        return arith.addi(hopper.shared_address(parts), arith.muli(number, bytes_of_row))

    def _of_shared_parts(self, first: ir.Value, element: ir.Value, count: int, apart: int) -> list[ir.Value]:
        """:func:`merged` of a row's parts in shared memory, so many bytes apart, and of a thread's element of them."""
        mine, behind = arith.addi(first, arith.muli(element, i32(4))), 4 * self.shape.head_dim
        return merged(
            [
                to_floats(hopper.load_shared(first, at + behind, 2) + hopper.load_shared(mine, at, 1), 4)
                for at in range(0, count * apart, apart)
            ]
        )

    def _store_part(
        self, target: ir.Value, element: ir.Value, out: ir.Value, largest: ir.Value, total: ir.Value, exists: ir.Value
    ) -> None:
        """A split's result of a row, whose first thread brings its maximum and sum, too."""
        place = arith.muli(element, i32(4))
        if self.shape.cut.clustered:
            space = "shared::cluster"
        else:
            space, place = "global", arith.extui(integer(64), place)
        hopper.store(space, arith.addi(target, place), [out], condition=exists)
        leads = arith.andi(exists, arith.cmpi(arith.CmpIPredicate.eq, element, i32(0)))
        hopper.store(space, target, [largest, total], 4 * self.shape.head_dim, leads)

    def merge_parts(self) -> Operation:
        """``(parts, y, split, sequence, kv head) -> ()``: a block's rows, whose parts have come from all splits."""
        s = self.shape

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), *[self.steps.scalar] * 3), return_type=())
        def write(_: Any, parts: Any, y: Any, *where: Any) -> Any:
            split, sequence, kv_head = (x.registers.item() for x in where)
            thread = utils.thread_idx()
            element, first = arith.andi(thread, i32(s.head_dim - 1)), arith.divui(thread, i32(s.head_dim))
            for i in range(0, self.rows_of_block, 32 * s.cut.warps // s.head_dim):
                number = arith.addi(first, i32(i))
                row = arith.addi(arith.muli(number, i32(s.cut.splits)), split)
                exists = arith.cmpi(arith.CmpIPredicate.ult, row, i32(s.rows))
                place = self._first_part(parts, arith.minui(number, i32(self.rows_of_block - 1)))
                _, total, out = self._of_shared_parts(place, element, s.cut.splits, 4 * s.pitch)
                self._store_result(y, sequence, kv_head, row, element, out, total, exists)
            return ()

        return cast(Operation, write)

    def _store_result(
        self, y: Any, sequence: ir.Value, kv_head: ir.Value, row: ir.Value, element: ir.Value,
        out: ir.Value, total: ir.Value, exists: ir.Value,
    ) -> None:  # fmt: skip
        """An element of a query row of ``[b, t, h, d]``, divided by the row's sum."""
        s = self.shape
        size = self.out_dtype.itemsize
        token, member = arith.divui(row, i32(s.group)), arith.remui(row, i32(s.group))
        place = hopper.global_address(
            y, size, (sequence, s.tokens * s.heads * s.head_dim), (token, s.heads * s.head_dim),
            (kv_head, s.group * s.head_dim), (member, s.head_dim), (element, 1),
        )  # fmt: skip
        store = {
            4: "@p st.global.f32 [$0], q;",
            2: "cvt.rn.bf16.f32 b, q; @p st.global.b16 [$0], b;",
        }[size]
        hopper.asm(
            "{ .reg .pred p; .reg .b16 b; .reg .f32 q; setp.ne.b32 p, $3, 0; div.rn.f32 q, $1, $2; " + store + " }",
            "l,f,f,r", [place, out, total, arith.extui(integer(32), exists)], [],
        )  # fmt: skip

    def collect(self) -> Operation:
        """``(state, partial, row of results, first split) -> state``: takes ``AT_ONCE`` splits' results of a row.

        A thread's state is the maximum, the sum and its element of the output. Query rows are counted over all
        sequences and kv heads.
        """
        s = self.shape

        @plgpu.inline_mgpu(
            arg_types=(self.row, plgpu.RefType(), self.steps.scalar, self.steps.scalar), return_type=self.row_type
        )
        def add(_: Any, state: Any, partial: Any, row: Any, first: Any) -> Any:
            single = ir.F32Type.get()
            row, element = row.registers.item(), arith.andi(utils.thread_idx(), i32(s.head_dim - 1))
            pair, row = arith.divui(row, i32(s.rows)), arith.remui(row, i32(s.rows))
            parts = []
            for i in range(AT_ONCE):
                split = arith.addi(first.registers.item(), i32(i))
                exists = arith.cmpi(arith.CmpIPredicate.slt, split, i32(s.cut.splits))
                block = arith.addi(arith.muli(pair, i32(s.cut.splits)), split)
                address = hopper.global_address(partial, 4, (block, s.rows * s.pitch), (row, s.pitch))
                mine = arith.addi(address, arith.extui(integer(64), arith.muli(element, i32(4))))
                words = [
                    load_once(1, mine, exists),
                    *(load_once(1, address, exists, 4 * (s.head_dim + j)) for j in (0, 1)),
                ]
                value, peak, weight = (arith.bitcast(single, word) for [word] in words)
                parts.append((arith.select(exists, peak, f32(MASKED)), weight, value))
            return hopper.pack(merged([hopper.unpack(state), *parts]))

        return cast(Operation, add)

    def finish(self) -> Operation:
        """``(state, y, row of results) -> ()``: divides by the sum and writes a row of ``[b, t, h, d]``."""
        s = self.shape

        @plgpu.inline_mgpu(arg_types=(self.row, plgpu.RefType(), self.steps.scalar), return_type=())
        def write(_: Any, state: Any, y: Any, row: Any) -> Any:
            _largest, total, out = hopper.unpack(state)
            row, element = row.registers.item(), utils.thread_idx()
            pair, row = arith.divui(row, i32(s.rows)), arith.remui(row, i32(s.rows))
            sequence, kv_head = arith.divui(pair, i32(s.kv_heads)), arith.remui(pair, i32(s.kv_heads))
            exists = arith.cmpi(arith.CmpIPredicate.ult, element, i32(s.head_dim))
            self._store_result(y, sequence, kv_head, row, element, out, total, exists)
            return ()

        return cast(Operation, write)


def merged(parts: Sequence[Sequence[ir.Value]]) -> list[ir.Value]:
    """Maximum, sum and output of a row whose parts have these, added up in their order."""
    peaks, *summed = zip(*parts, strict=True)
    largest = functools.reduce(arithmetic.maximum, peaks)
    factors = [arithmetic.exp2(arith.subf(peak, largest)) for peak in peaks]
    return [largest, *(functools.reduce(arith.addf, map(arith.mulf, values, factors)) for values in summed)]
