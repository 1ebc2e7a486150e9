"""The register-level steps of :mod:`pallas_kernels.mosaic_append`; of a prompt's blocks :mod:`.append_block_steps`.

A unit is a head of a token, of which each of several lanes holds some channels. What a thread does is straight-line
code: what it reads next is asked for before it works on what has come, and no register has to be moved for that.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import arithmetic, hopper
from pallas_kernels.append_lanes import EACH, Halves, Lanes, Mixed, mix, norm_of_mixed
from pallas_kernels.append_values import InTurn, rounded, signed_peak, times
from pallas_kernels.hopper import f32, i32
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.packing import INT4_MAX, INT4_MIN
from pallas_kernels.reference_rotation import QUERY_MAX
from pallas_kernels.row_steps import largest_magnitude, to_floats

TOGETHER = 2  # heads of queries that a lane works on at once, if they are not mixed
WARP_BYTES = 512  # of a head of each of a warp's units, in bf16
COPIES_AHEAD = 4  # heads of queries that are on their way
SMALLEST_NORMAL = 2.0**-126  # whose reciprocal is finite
Table = Callable[[], list[ir.Value]]  # gives a lane's channels
ROUNDING = 1.5 * 2.0**23 - INT4_MIN  # a float32 of which neighbours are 1 apart, and whose last 16 bits are 8


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


class KeyTables(NamedTuple):
    """What keys of one head are multiplied by, and what is added to them; if the shape has it."""

    inverse_scale: Table
    minus_offset: Table


class InCache(NamedTuple):
    """Where a unit's int4 codes go to, and their scale."""

    codes: Row
    scale: Row


class Steps:
    """The register-level steps for one shape.

    Attributes:
      values_held: how lanes hold values.
      read: how they hold queries and keys as they come.
      made: how they hold them when they are written.
      norm: what is made, mixed by a matrix of ones, is one over this times too large.
    """

    def __init__(self, shape: AppendShape) -> None:
        self.shape = shape
        self.scalar = plgpu.Layout.WG_SPLAT(())
        self.values_held = Halves(shape.head_dim)
        self.read = Halves(shape.head_dim, turned=shape.mixed)
        self.made: Lanes = Mixed(shape.head_dim) if shape.mixed else self.read
        self.norm = norm_of_mixed(shape.head_dim) if shape.mixed else 1.0

    def _row(self, lanes: Lanes, ref: Any, size: int, row: ir.Value, columns: int | None = None) -> Row:
        """What a lane has of a row's first group of channels, of elements of ``size`` bytes."""
        columns = self.shape.head_dim if columns is None else columns
        return Row(hopper.global_address(ref, size, (row, columns), (lanes.column(), 1)))

    def _load(self, row: Row, size: int, halves: int = 2) -> list[ir.Value]:
        """Words of a lane's channels, zeros where there is no row; of both halves or only the first."""
        words = []
        for half in range(halves):
            offset = row.offset + half * self.shape.head_dim // 2 * size
            words += hopper.load_global(EACH * size // 4, row.address, row.exists, offset)
        return words

    def _floats(self, row: Row, halves: int = 2) -> list[ir.Value]:
        """As :meth:`_load`, of float32."""
        return to_floats(self._load(row, 4, halves), 4)

    def _word(self, ref: Any, index: ir.Value) -> ir.Value:
        """Of a vector of words that nothing writes."""
        return hopper.load_global(1, hopper.global_address(ref, 4, (index, 1)), load=hopper.READ_ONLY)[0]

    def _rotation(self, cosines: Row, sines: Row) -> tuple[list[ir.Value], list[ir.Value]]:
        """Of a token."""
        return self._floats(cosines, 1), self._floats(sines, 1)

    def _rotated(
        self, values: Sequence[ir.Value], rotation: tuple[list[ir.Value], list[ir.Value]]
    ) -> list[ir.Value]:  # fmt: skip
        """A head with its pairs (i, i + d / 2) rotated."""
        (cos, sin), fma = rotation, arithmetic.multiply_add
        low, high = values[:EACH], values[EACH:]
        new_low = [fma(a, c, arith.negf(arith.mulf(b, s))) for a, b, c, s in zip(low, high, cos, sin, strict=True)]
        new_high = [fma(b, c, arith.mulf(a, s)) for a, b, c, s in zip(low, high, cos, sin, strict=True)]
        return [*new_low, *new_high]

    def _store_e4m3(self, row: Row, words: Sequence[ir.Value]) -> None:
        """Writes a lane's e4m3 of a query or key, a word of each group."""
        if self.made.apart == EACH:
            hopper.store_global(row.address, words, row.offset, row.exists)
            return
        for group, word in enumerate(words):
            store(row.behind(group * self.made.apart), word)

    def _through_shared_memory(
        self, q: Any, room: Any, row: ir.Value, each: int, exists: Callable[[int], ir.Value | None]
    ) -> tuple[Callable[[Sequence[int]], None], Callable[[int], list[ir.Value]]]:
        """How ``each`` heads of a unit's lanes, of which ``row`` is the first, come by a way that takes no registers.

        Returns:
          What asks for several of them, as a group of copies; and what gives a lane's words of one that is there.
        """
        d, thread = self.shape.head_dim, utils.thread_idx()
        lane, warp = arith.andi(thread, i32(31)), arith.shrui(thread, i32(5))
        room_of_warp = arith.addi(hopper.shared_address(room), arith.muli(warp, i32(WARP_BYTES * each)))
        # Lanes copy 16 neighbouring bytes, eight bf16, whichever they read then.
        target = arith.addi(room_of_warp, arith.muli(lane, i32(16)))
        part = arith.muli(arith.andi(lane, i32(self.shape.lanes - 1)), i32(8))
        source = hopper.global_address(q, 2, (row, d), (part, 1))
        own = arith.addi(room_of_warp, arith.muli(arith.divui(lane, i32(self.shape.lanes)), i32(2 * d)))
        own = arith.addi(own, arith.muli(self.read.column(), i32(2)))

        def ask(several: Sequence[int]) -> None:
            for i in several:
                hopper.copy_to_shared(target, source, WARP_BYTES * i, 2 * d * i, exists(i))
            hopper.end_group_of_copies()

        def load(i: int) -> list[ir.Value]:
            places = [WARP_BYTES * i + 2 * group * self.read.apart for group in range(2)]
            return [word for place in places for word in hopper.load_shared(own, place, words=2)]

        return ask, load

    def queries(self, each: int, through_shared: bool) -> Operation:
        """``(q, cosines, sines, scales, q8, q_scale, first) -> ()``: e4m3, scale ``max|x| / QUERY_MAX``, or 1 of 0.

        Every unit's lanes take ``each`` neighbouring heads of a token, the block's first unit those of number
        ``first``. Quotients are products with reciprocals, up to their last bits.

        Heads may come through shared memory, which is another argument then, behind ``q_scale``, and has ``WARP_BYTES``
        of each warp for each of its lanes' heads.
        """
        s, d = self.shape, self.shape.head_dim
        parts = -(-s.heads // each)  # of a token's heads
        group = s.heads // s.kv_heads

        @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * (6 + through_shared), self.scalar), return_type=())
        def queries(_: Any, q: Any, cosines: Any, sines: Any, scales: Any, q8: Any, q_scale: Any, *others: Any) -> Any:
            *room, first = others

            def place(lanes: Lanes) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
                """Whether a lane's unit is there, its token, its first head, and that as a row."""
                unit, count = arith.addi(first.registers.item(), lanes.unit()), s.batch * s.tokens * parts
                here = arith.cmpi(arith.CmpIPredicate.ult, unit, i32(count))
                unit = arith.minui(unit, i32(count - 1))
                token = arith.divui(unit, i32(parts))
                head = arith.muli(arith.remui(unit, i32(parts)), i32(each))
                return here, token, head, arith.addi(arith.muli(token, i32(s.heads)), head)

            def exists(head: ir.Value, i: int) -> ir.Value | None:
                """Whether the token has the head; None if all have that many."""
                if s.heads % each == 0:
                    return None
                return arith.cmpi(arith.CmpIPredicate.ult, arith.addi(head, i32(i)), i32(s.heads))

            _, token, head, row = place(self.read)
            here, _, head_made, row_made = place(self.made)
            targets = self._row(self.made, q8, 1, row_made)
            scale_target = Row(hopper.global_address(q_scale, 4, (row_made, 1)))

            # Whether for all units it is the same heads of theirs that share a kv head.
            aligned = group % each == 0 or each % group == 0

            def table(first: int) -> list[ir.Value]:
                """The scales of the kv head that a head reads."""
                kv_head = arith.divui(arith.addi(head, i32(first)), i32(group))
                kv_head = arith.minui(kv_head, i32(s.kv_heads - 1))
                return self._floats(self._row(self.read, scales, 4, kv_head))

            # Loaded again for other heads, so that 64 registers are enough and a multiprocessor holds 32 warps; but
            # what mixes takes more in any case.
            table = functools.cache(table) if s.mixed else table
            firsts = [i // group * group if aligned else i for i in range(each)]
            together = [range(i, min(i + TOGETHER, each)) for i in range(0, each, TOGETHER)]
            # Mixing takes registers, and waits for nothing; so do two heads' own scales.
            if s.mixed or (s.scaled and any(firsts[several[0]] != firsts[several[-1]] for several in together)):
                together = [range(i, i + 1) for i in range(each)]
            if through_shared:
                ask, load = self._through_shared_memory(q, room[0], row, each, functools.partial(exists, head))
            else:
                sources = self._row(self.read, q, 2, row)
            ahead = max(1, COPIES_AHEAD // len(together[0]))
            for several in together[:ahead] if through_shared else []:
                ask(several)
            in_turn = InTurn()
            rotation = self._rotation(*(self._row(self.read, x, 4, token, d // 2) for x in (cosines, sines)))
            for number, several in enumerate(together):
                if through_shared:
                    hopper.wait_for_copies(min(ahead, len(together) - number) - 1)
                    if number + ahead < len(together):
                        ask(together[number + ahead])
                    loaded = [load(i) for i in several]
                else:
                    rows = [sources.behind(2 * d * i)._replace(exists=exists(head, i)) for i in several]
                    loaded = [self._load(source, 2) for source in rows]
                made = [self._rotated(in_turn.to_floats(words), rotation) for words in loaded]
                if s.scaled:
                    made = [times(values, table(firsts[i])) for i, values in zip(several, made, strict=True)]
                if s.mixed:
                    made = [mix(values, d, utils.thread_idx) for values in made]
                # Each lane makes the scale of one of the heads.
                peak = self.made.spread(map(largest_magnitude, made), len(made), arithmetic.maximum_or_nan)
                zero = arith.cmpf(arith.CmpFPredicate.OEQ, peak, f32(0))
                scale = arith.select(zero, f32(1), arith.mulf(peak, f32(self.norm / QUERY_MAX)))
                factor = arithmetic.approximate_reciprocal(arithmetic.maximum(scale, f32(SMALLEST_NORMAL)))
                if s.mixed:
                    factor = arith.mulf(factor, f32(self.norm))
                in_turn.comes_first(factor)
                flags = []
                for i, values in zip(several, made, strict=True):
                    flags.append(here if (it := exists(head_made, i)) is None else arith.andi(here, it))
                    its = self.made.of_number(factor, i - several[0], len(several))
                    self._store_e4m3(targets.behind(d * i)._replace(exists=flags[-1]), rounded(values, its))
                writes = self.made.is_first(len(several))
                for i, flag in zip(several, flags, strict=True):
                    if len(several) > 1:
                        mine = self.made.number(len(several))
                        flag = arith.andi(flag, arith.cmpi(arith.CmpIPredicate.eq, mine, i32(i - several[0])))
                    store(scale_target.behind(4 * i)._replace(exists=arith.andi(writes, flag)), scale)
            return ()

        return cast(Operation, queries)

    def _key(
        self, values: Sequence[ir.Value], rotation: tuple[list[ir.Value], list[ir.Value]],
        tables: KeyTables,
    ) -> list[ir.Value]:  # fmt: skip
        """A head of a key, as it is made."""
        values = self._rotated(values, rotation)
        # Tables are loaded where they are needed: each would take eight registers.
        if not self.shape.mixed:
            return times(values, tables.inverse_scale()) if self.shape.scaled else values
        factors = tables.inverse_scale() if self.shape.scaled else [f32(1)] * len(values)
        moved = map(arithmetic.multiply_add, values, factors, tables.minus_offset())
        return mix(list(moved), self.shape.head_dim, hopper.thread_anew)

    def _key_tables(self, scale: Any, offset: Any, kv_head: ir.Value) -> KeyTables:
        """Of a kv head."""
        scales, offsets = (self._row(self.read, table, 4, kv_head) for table in (scale, offset))
        return KeyTables(
            lambda: [arithmetic.approximate_reciprocal(r) for r in self._floats(scales)],
            lambda: [arith.negf(r) for r in self._floats(offsets)],
        )

    def _in_cache(self, lanes: Lanes, codes: Any, scales: Any, row: ir.Value, slot: ir.Value) -> InCache:
        """Of a sequence and kv head, counted as ``row``."""
        row = arith.addi(arith.muli(row, i32(self.shape.slots)), slot)
        column = arith.divui(lanes.column(), i32(2))
        address = hopper.global_address(codes, 1, (row, self.shape.head_dim // 2), (column, 1))
        return InCache(Row(address), Row(hopper.global_address(scales, 2, (row, 1))))

    def _store_codes(self, lanes: Lanes, target: Row, registers: Sequence[ir.Value], factor: ir.Value) -> None:
        """Writes a lane's int4 codes like ``quantize_kv``'s, given one over their scale.

        Below -8 there is none: not even the rounding of scales brings a quotient down to -8.5.
        """
        word = ir.IntegerType.get_signless(32)
        # Added to ROUNDING a number becomes an integer in the last bits: the code plus 8.
        numbers = [arith.bitcast(word, arithmetic.multiply_add(r, factor, f32(ROUNDING))) for r in registers]
        # The first group's in the lower 16 bits, the second's in the upper ones.
        pairs = [arithmetic.permute(a, b, 0x5410) for a, b in zip(numbers[:EACH], numbers[EACH:], strict=True)]
        codes = i32(0)
        for i, pair in enumerate(pairs):
            pair = arithmetic.of_pairs("min.u16x2", pair, i32(INT4_MAX - INT4_MIN << 16 | INT4_MAX - INT4_MIN))
            codes = arith.addi(codes, arith.shli(pair, i32(4 * i)))
        codes = arith.xori(codes, i32(0x88888888))
        if lanes.apart == EACH:
            store(target, codes)
            return
        store_half(target, codes)
        store_half(target.behind(lanes.apart // 2), arith.shrui(codes, i32(16)))

    def _cache_scale(self, peak: ir.Value, norm: float) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Of the :func:`signed_peak` of a unit that is one over ``norm`` times too large.

        Returns:
          The largest magnitude, the scale of ``quantize_kv`` in bf16, and by what the unit is to be multiplied.
        """
        magnitude = arith.bitcast(ir.F32Type.get(), arith.shrui(peak, i32(1)))
        if norm != 1:
            magnitude = arith.mulf(magnitude, f32(norm))
        positive = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(peak, i32(1)), i32(0))
        zero = arith.cmpf(arith.CmpFPredicate.OEQ, magnitude, f32(0))
        scale = arith.mulf(magnitude, f32(-1 / INT4_MIN))
        scale = arith.select(zero, f32(1), arith.select(positive, arith.negf(scale), scale))
        in_bf16 = arithmetic.to_bf16x2(scale, f32(0))
        scale = arith.bitcast(ir.F32Type.get(), arith.shli(in_bf16, i32(16)))
        factor = arithmetic.reciprocal(scale)
        return magnitude, in_bf16, factor if norm == 1 else arith.mulf(factor, f32(norm))

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
            read, made = (self.read, self.made) if kind == "keys" else (self.values_held, self.values_held)

            def place(lanes: Lanes) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
                """Whether a lane's unit is there, the unit, its token and its head."""
                unit, count = arith.addi(first.registers.item(), lanes.unit()), s.batch * s.tokens * s.kv_heads
                exists = arith.cmpi(arith.CmpIPredicate.ult, unit, i32(count))
                unit = arith.minui(unit, i32(count - 1))
                return exists, unit, arith.divui(unit, i32(s.kv_heads)), arith.remui(unit, i32(s.kv_heads))

            _, unit, token, head = place(read)
            words = self._load(self._row(read, x, 2, unit), 2)
            angles = [self._row(read, table, 4, token, d // 2) for table in (cosines, sines)]
            exists, _, token, head_made = place(made)
            sequence, number = arith.divui(token, i32(s.tokens)), arith.remui(token, i32(s.tokens))
            start, length = (self._word(ref, sequence) for ref in (starts, lengths))
            registers, norm = to_floats(words, 2), 1.0
            if kind == "keys":
                registers = self._key(registers, self._rotation(*angles), self._key_tables(scale, offset, head))
                norm = self.norm
            peak = made.spread(iter([signed_peak(registers)]), 1, arith.maxui)
            _, in_bf16, factor = self._cache_scale(peak, norm)
            slot = arith.addi(start, number)
            kept = arith.andi(
                arith.cmpi(arith.CmpIPredicate.slt, number, length),
                arith.cmpi(arith.CmpIPredicate.slt, slot, i32(s.slots)),
            )
            kept = arith.andi(kept, exists)
            row = arith.addi(arith.muli(sequence, i32(s.kv_heads)), head_made)
            target = self._in_cache(made, codes, scales, row, arith.select(kept, slot, i32(0)))
            self._store_codes(made, target.codes._replace(exists=kept), registers, factor)
            kept = arith.andi(made.is_first(1), kept)
            store_half(target.scale._replace(exists=kept), in_bf16)
            return ()

        return cast(Operation, append)


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
