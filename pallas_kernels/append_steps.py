"""The register-level steps of :mod:`pallas_kernels.mosaic_append`; of a prompt's blocks :mod:`.append_block_steps`.

A unit is a head of a token, of which each of several lanes holds some channels. What a thread does is straight-line
code: what it reads next is asked for before it works on what has come, and no register has to be moved for that.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import arithmetic, hopper
from pallas_kernels.hopper import f32, i32
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.packing import INT4_MIN
from pallas_kernels.reference_rotation import QUERY_MAX
from pallas_kernels.row_steps import balanced, largest_magnitude, to_floats

EACH = 4  # neighbouring channels of each half of a head that a lane holds
TOGETHER = 2  # heads of queries that a lane works on at once, if they are not mixed; as many are on their way
SMALLEST_NORMAL = 2.0**-126  # whose reciprocal is finite
Table = Callable[[], list[ir.Value]]  # gives a lane's channels
ROUNDING = 1.5 * 2.0**23 - INT4_MIN  # a float32 of which neighbours are 1 apart


@dataclasses.dataclass(frozen=True)
class AppendShape:
    """Static sizes.

    Attributes:
      batch: sequences.
      tokens: new tokens per sequence.
      heads: query heads.
      kv_heads: key/value heads.
      head_dim: 64 or 128.
      slots: of the cache.
      warps: of a block of threads.
      scaled: whether there is a table of scales.
      mixed: whether keys are moved by an offset, and queries and keys multiplied with a Hadamard matrix.
    """

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    warps: int
    scaled: bool
    mixed: bool

    @property
    def lanes(self) -> int:
        """That hold a unit."""
        return self.head_dim // (2 * EACH)

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps

    @property
    def units(self) -> int:
        """That a block holds at once."""
        return self.threads // self.lanes


class Row(NamedTuple):
    """A row in global memory, or behind it.

    Attributes:
      address: of what a lane has of some row.
      offset: bytes from there to this one.
      exists: a bit, or None if it does.
    """

    address: ir.Value
    offset: int = 0
    exists: ir.Value | None = None

    def behind(self, size: int) -> "Row":
        """What lies so many bytes behind."""
        return self._replace(offset=self.offset + size)


class InCache(NamedTuple):
    """Where a unit's int4 codes go to, and their scale."""

    codes: Row
    scale: Row


class Steps:
    """The register-level steps for one shape.

    Lane l of a unit's holds the channels 4 l to 4 l + 3 of the head's first half, then those of its second.
    """

    def __init__(self, shape: AppendShape) -> None:
        self.shape = shape
        self.scalar = plgpu.Layout.WG_SPLAT(())

    def _lane(self) -> ir.Value:
        """A lane's number among those of its unit."""
        return arith.andi(utils.thread_idx(), i32(self.shape.lanes - 1))

    def _is_first_lane(self) -> ir.Value:
        return arith.cmpi(arith.CmpIPredicate.eq, self._lane(), i32(0))

    def _number(self, first: Any) -> ir.Value:
        """Of a lane's unit."""
        return arith.addi(first.registers.item(), arith.divui(utils.thread_idx(), i32(self.shape.lanes)))

    def _row(self, ref: Any, size: int, row: ir.Value | int, columns: int, exists: ir.Value | None = None) -> Row:
        """What a lane has of a row's first half, of elements of ``size`` bytes."""
        return Row(hopper.global_address(ref, size, (row, columns), (self._lane(), EACH)), 0, exists)

    def _load(self, row: Row, columns: int, size: int) -> list[ir.Value]:
        """Words of a lane's channels, zeros where there is no row; of ``head_dim / 2`` columns only one half."""
        d, words = self.shape.head_dim, []
        for half in range(2 * columns // d):
            offset = row.offset + half * d // 2 * size
            words += hopper.load_global(EACH * size // 4, row.address, row.exists, offset)
        return words

    def _floats(self, row: Row, columns: int) -> list[ir.Value]:
        """As :meth:`_load`, of float32."""
        return to_floats(self._load(row, columns, 4), 4)

    def _word(self, ref: Any, index: ir.Value) -> ir.Value:
        """Of a vector of words that nothing writes."""
        return hopper.load_global(1, hopper.global_address(ref, 4, (index, 1)), load=hopper.READ_ONLY)[0]

    def _rotation(self, cosines: Row, sines: Row) -> tuple[list[ir.Value], list[ir.Value]]:
        """Of a token."""
        half = self.shape.head_dim // 2
        return self._floats(cosines, half), self._floats(sines, half)

    def _rotated(
        self, words: Sequence[ir.Value], rotation: tuple[list[ir.Value], list[ir.Value]]
    ) -> list[ir.Value]:  # fmt: skip
        """A head in bf16 with its pairs (i, i + d / 2) rotated, in float32."""
        values, (cos, sin), fma = to_floats(words, 2), rotation, arithmetic.multiply_add
        low, high = values[:EACH], values[EACH:]
        new_low = [fma(a, c, arith.negf(arith.mulf(b, s))) for a, b, c, s in zip(low, high, cos, sin, strict=True)]
        new_high = [fma(b, c, arith.mulf(a, s)) for a, b, c, s in zip(low, high, cos, sin, strict=True)]
        return [*new_low, *new_high]

    def _held_if_mixed[**P](self, table: Callable[P, list[ir.Value]]) -> Callable[P, list[ir.Value]]:
        """Has a table's registers loaded once by kernels that mix, and else again wherever they are needed.

        Without them 64 registers are enough, with which a multiprocessor holds a third more warps. What mixes needs
        more in any case.
        """
        return cast(Callable[P, list[ir.Value]], functools.cache(table)) if self.shape.mixed else table

    def _mixed(self, registers: Sequence[ir.Value]) -> list[ir.Value]:
        """Times the orthonormal Hadamard matrix of Sylvester's construction."""
        registers = list(registers)
        # A butterfly per bit of the channel's number: in registers, then between lanes.
        stride = 1
        while stride < len(registers):
            new = list(registers)
            for i in range(len(registers)):
                if not i & stride:
                    new[i] = arith.addf(registers[i], registers[i + stride])
                    new[i + stride] = arith.subf(registers[i], registers[i + stride])
            registers, stride = new, 2 * stride
        for distance in (2**bit for bit in range(self.shape.lanes.bit_length() - 1)):
            upper = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(self._lane(), i32(distance)), i32(0))
            sign = arith.select(upper, f32(-1), f32(1))
            registers = [arithmetic.multiply_add(r, sign, hopper.exchange(r, distance)) for r in registers]
        return [arith.mulf(r, f32(1 / math.sqrt(self.shape.head_dim))) for r in registers]

    def _store_e4m3(self, row: Row, registers: Sequence[ir.Value], factor: ir.Value) -> None:
        """Writes a unit's head, times the factor, to a row of ``head_dim`` e4m3."""
        for half, part in enumerate(rounded(registers, factor)):
            store(row.behind(half * self.shape.head_dim // 2), part)

    def queries(self, each: int) -> Operation:
        """``(q, cosines, sines, scales, q8, q_scale, first) -> ()``: e4m3, scale ``max|x| / QUERY_MAX``, or 1 of 0.

        Every unit's lanes take ``each`` neighbouring heads of a token, the block's first unit those of number
        ``first``. Quotients are products with reciprocals, up to their last bits.
        """
        s, d = self.shape, self.shape.head_dim
        parts = -(-s.heads // each)  # of a token's heads
        group = s.heads // s.kv_heads

        @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 6, self.scalar), return_type=())
        def queries(_: Any, q: Any, cosines: Any, sines: Any, scales: Any, q8: Any, q_scale: Any, first: Any) -> Any:
            unit, count = self._number(first), s.batch * s.tokens * parts
            here = arith.cmpi(arith.CmpIPredicate.ult, unit, i32(count))
            unit = arith.minui(unit, i32(count - 1))
            token = arith.divui(unit, i32(parts))
            head = arith.muli(arith.remui(unit, i32(parts)), i32(each))
            row = arith.addi(arith.muli(token, i32(s.heads)), head)
            sources, targets = self._row(q, 2, row, d), self._row(q8, 1, row, d)
            scale_target = Row(hopper.global_address(q_scale, 4, (row, 1)))

            def exists(i: int) -> ir.Value | None:
                """Whether the token has the head; None if all have that many."""
                if s.heads % each == 0:
                    return None
                return arith.cmpi(arith.CmpIPredicate.ult, arith.addi(head, i32(i)), i32(s.heads))

            def load(several: Sequence[int]) -> list[list[ir.Value]]:
                return [self._load(sources.behind(2 * d * i)._replace(exists=exists(i)), d, 2) for i in several]

            # Whether for all units it is the same heads of theirs that share a kv head.
            aligned = group % each == 0 or each % group == 0

            @self._held_if_mixed
            def table(first: int) -> list[ir.Value]:
                """The scales of the kv head that a head reads."""
                kv_head = arith.divui(arith.addi(head, i32(first)), i32(group))
                kv_head = arith.minui(kv_head, i32(s.kv_heads - 1))
                return self._floats(self._row(scales, 4, kv_head, d), d)

            # Mixing takes registers, and waits for nothing; so do scales of several kv heads.
            step = 1 if s.mixed or (s.scaled and not aligned) else TOGETHER
            together = [range(i, min(i + step, each)) for i in range(0, each, step)]
            following = load(together[0])
            rotation = self._rotation(*(self._row(x, 4, token, d // 2) for x in (cosines, sines)))
            for number, several in enumerate(together):
                loaded = following
                if number + 1 < len(together):
                    following = load(together[number + 1])
                made = [self._rotated(words, rotation) for words in loaded]
                if s.scaled:
                    firsts = [i // group * group if aligned else i for i in several]
                    made = [times(values, table(first)) for first, values in zip(firsts, made, strict=True)]
                if s.mixed:
                    made = [self._mixed(values) for values in made]
                peaks = [largest_magnitude(values) for values in made]
                peaks = hopper.all_across_lanes(peaks, arithmetic.maximum_or_nan, s.lanes)
                for i, values, peak in zip(several, made, peaks, strict=True):
                    flag = here if (it := exists(i)) is None else arith.andi(here, it)
                    zero = arith.cmpf(arith.CmpFPredicate.OEQ, peak, f32(0))
                    scale = arith.select(zero, f32(1), arith.mulf(peak, f32(1 / QUERY_MAX)))
                    factor = arithmetic.approximate_reciprocal(arithmetic.maximum(scale, f32(SMALLEST_NORMAL)))
                    self._store_e4m3(targets.behind(d * i)._replace(exists=flag), values, factor)
                    flag = arith.andi(self._is_first_lane(), flag)
                    store(scale_target.behind(4 * i)._replace(exists=flag), scale)
            return ()

        return cast(Operation, queries)

    def _key(
        self, words: Sequence[ir.Value], rotation: tuple[list[ir.Value], list[ir.Value]],
        inverse_scale: Table | None, offset: Row | None,
    ) -> list[ir.Value]:  # fmt: skip
        """A head of a key."""
        values = self._rotated(words, rotation)
        if inverse_scale is not None:
            values = times(values, inverse_scale())
        if offset is None:
            return values
        # Loaded where it is needed: it would take eight registers.
        moved = [arith.subf(a, b) for a, b in zip(values, self._floats(offset, self.shape.head_dim), strict=True)]
        return self._mixed(moved)

    def _tables_of_keys(self, scale: Any, offset: Any, kv_head: ir.Value) -> tuple[Table | None, Row | None]:
        """Of a kv head: what gives one over its scales, and where its offset is, if the shape has them."""
        s, d = self.shape, self.shape.head_dim
        scale_row, offset_row = (self._row(table, 4, kv_head, d) for table in (scale, offset))

        @self._held_if_mixed
        def inverse_scale() -> list[ir.Value]:
            return [arithmetic.approximate_reciprocal(r) for r in self._floats(scale_row, d)]

        return inverse_scale if s.scaled else None, offset_row if s.mixed else None

    def _in_cache(self, codes: Any, scales: Any, row: ir.Value, slot: ir.Value, kept: ir.Value | None) -> InCache:
        """Of a sequence and kv head, counted as ``row``."""
        row = arith.addi(arith.muli(row, i32(self.shape.slots)), slot)
        half = self.shape.head_dim // 2
        address = hopper.global_address(codes, 1, (row, half), (self._lane(), EACH // 2))
        return InCache(Row(address, 0, kept), Row(hopper.global_address(scales, 2, (row, 1)), 0, kept))

    def _signed_peak(self, registers: Sequence[ir.Value]) -> tuple[ir.Value, ir.Value]:
        """The largest magnitude of a unit, or NaN, and whether it is a positive entry's alone.

        With its sign behind its last bit a float32 is an integer that is the larger, the larger its magnitude.
        """
        word = ir.IntegerType.get_signless(32)
        turned = [
            hopper.pure_asm("shf.l.wrap.b32 $0, $1, $1, 1;", "=r,r", [arith.bitcast(word, r)], word) for r in registers
        ]
        largest = hopper.across_lanes(balanced(turned, arith.maxui), arith.maxui, self.shape.lanes)
        positive = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(largest, i32(1)), i32(0))
        return arith.bitcast(ir.F32Type.get(), arith.shrui(largest, i32(1))), positive

    def _codes(self, registers: Sequence[ir.Value], factor: ir.Value) -> list[ir.Value]:
        """A lane's int4 codes of the first and of the second half, each in the lower 16 bits of a word."""
        word = ir.IntegerType.get_signless(32)
        # Added to ROUNDING a number becomes an integer in the last bits, whose last four are the code's plus 8.
        numbers = [arith.bitcast(word, arithmetic.multiply_add(r, factor, f32(ROUNDING))) for r in registers]
        lowest = int(np.float32(ROUNDING + INT4_MIN).view(np.int32))
        numbers = [arith.minsi(arith.maxsi(x, i32(lowest)), i32(lowest + 15)) for x in numbers]
        words = []
        for half in (numbers[:EACH], numbers[EACH:]):
            four = half[0]
            for i, number in enumerate(half[1:], start=1):
                four = arith.addi(four, arith.shli(number, i32(4 * i)))  # of what is not the code nothing is below 2^16
            words.append(arith.xori(four, i32(0x8888)))
        return words

    def _append(self, registers: Sequence[ir.Value], target: InCache) -> ir.Value:
        """Writes a unit's int4 codes and their scale, like ``quantize_kv``'s; gives its largest magnitude, or NaN."""
        single = ir.F32Type.get()
        peak, positive = self._signed_peak(registers)
        zero = arith.cmpf(arith.CmpFPredicate.OEQ, peak, f32(0))
        magnitude = arith.select(zero, f32(1), arith.mulf(peak, f32(-1 / INT4_MIN)))
        positive = arith.andi(positive, arith.cmpf(arith.CmpFPredicate.OGT, peak, f32(0)))
        scale = arith.select(positive, arith.subf(f32(0), magnitude), magnitude)
        in_bf16 = arithmetic.to_bf16x2(scale, f32(0))
        scale = arith.bitcast(single, arith.shli(in_bf16, i32(16)))
        for half, part in enumerate(self._codes(registers, arithmetic.reciprocal(scale))):
            store_half(target.codes.behind(half * self.shape.head_dim // 4), part)
        exists = self._is_first_lane()
        if target.scale.exists is not None:
            exists = arith.andi(exists, target.scale.exists)
        store_half(target.scale._replace(exists=exists), in_bf16)
        return peak

    def append(self, kind: Literal["keys", "values"]) -> Operation:
        """``(x, cosines, sines, scale, offset, codes, scales, starts, lengths, first) -> ()``: a block's units.

        They go to their slots, if the cache has them.
        """
        s, d = self.shape, self.shape.head_dim

        @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 9, self.scalar), return_type=())
        def append(
            _: Any, x: Any, cosines: Any, sines: Any, scale: Any, offset: Any, codes: Any, scales: Any, starts: Any,
            lengths: Any, first: Any,
        ) -> Any:  # fmt: skip
            unit, count = self._number(first), s.batch * s.tokens * s.kv_heads
            exists = arith.cmpi(arith.CmpIPredicate.ult, unit, i32(count))
            unit = arith.minui(unit, i32(count - 1))
            token, head = arith.divui(unit, i32(s.kv_heads)), arith.remui(unit, i32(s.kv_heads))
            words = self._load(self._row(x, 2, unit, d), d, 2)
            sequence, number = arith.divui(token, i32(s.tokens)), arith.remui(token, i32(s.tokens))
            start, length = (self._word(ref, sequence) for ref in (starts, lengths))
            if kind == "keys":
                rotation = self._rotation(*(self._row(x, 4, token, d // 2) for x in (cosines, sines)))
                registers = self._key(words, rotation, *self._tables_of_keys(scale, offset, head))
            else:
                registers = to_floats(words, 2)
            slot = arith.addi(start, number)
            kept = arith.andi(
                arith.cmpi(arith.CmpIPredicate.slt, number, length),
                arith.cmpi(arith.CmpIPredicate.slt, slot, i32(s.slots)),
            )
            kept = arith.andi(kept, exists)
            row = arith.addi(arith.muli(sequence, i32(s.kv_heads)), head)
            self._append(registers, self._in_cache(codes, scales, row, arith.select(kept, slot, i32(0)), kept))
            return ()

        return cast(Operation, append)


def times(values: Sequence[ir.Value], factors: Sequence[ir.Value]) -> list[ir.Value]:
    """Products of float32."""
    return [arith.mulf(a, b) for a, b in zip(values, factors, strict=True)]


def rounded(registers: Sequence[ir.Value], factor: ir.Value) -> list[ir.Value]:
    """A lane's channels of the first and of the second half, times the factor, as words of four e4m3."""
    scaled = [arith.mulf(r, factor) for r in registers]
    return [arithmetic.to_e4m3x4(scaled[EACH * half : EACH * (half + 1)]) for half in range(2)]


def store(row: Row, value: ir.Value) -> None:
    """Writes a float32 or a word to a row that exists."""
    hopper.store_global(row.address, [value], row.offset, row.exists)


def store_half(row: Row, word: ir.Value) -> None:
    """Writes the lower half of a word to a row that exists."""
    split, instruction = ".reg .b16 l, h; mov.b32 {l, h}, $1; ", f"st.global.b16 [$0+{row.offset}], l;"
    if row.exists is None:
        hopper.asm(f"{{ {split}{instruction} }}", "l,r", [row.address, word], [])
        return
    flag = arith.extui(ir.IntegerType.get_signless(32), row.exists)
    hopper.asm(
        f"{{ .reg .pred p; {split}setp.ne.b32 p, $2, 0; @p {instruction} }}", "l,r,r", [row.address, word, flag], []
    )
