"""The register-level steps of :mod:`pallas_kernels.mosaic_append` for a prompt, whose keys and values are e4m3, too.

A block of threads takes as many tokens of a head as share a scale, and holds them until it is known.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import arithmetic, hopper
from pallas_kernels.append_lanes import EACH, Lanes
from pallas_kernels.append_steps import AppendShape, InCache, KeyTables, Row, Steps, store_half
from pallas_kernels.append_values import InTurn, rounded, signed_peak, signed_peak_of_bf16
from pallas_kernels.hopper import f32, i32
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.reference import E4M3_MAX
from pallas_kernels.reference_rotation import KEY_MAX, MANTISSA, SCALE_TOKENS
from pallas_kernels.row_steps import balanced, e4m3_scale, to_floats

AHEAD = 4  # tokens of values that are on their way
SPREAD = 4  # tokens of which each of as many lanes makes a scale


class Tokens(NamedTuple):
    """A lane's tokens in a block of a prompt's.

    Attributes:
      row: the sequence and kv head, as one number.
      head: the kv head.
      first: the first token, counted over all sequences.
      slot: of the first token in the cache.
      number: of the first token in its sequence.
      tokens: of a sequence, with padding.
      full: whether all blocks of tokens are.
      real: those without padding.
      kept: those of them that the cache has slots for.
    """

    row: ir.Value
    head: ir.Value
    first: ir.Value
    slot: ir.Value
    number: ir.Value
    tokens: ir.Value
    full: bool
    real: ir.Value
    kept: ir.Value

    def in_sequence(self, behind: int) -> ir.Value | None:
        """Whether there is the token so far behind the first one; None if the last blocks of sequences are full."""
        return None if self.full else self.among(self.tokens, behind)

    def among(self, end: ir.Value, behind: int) -> ir.Value:
        """Whether the token so far behind the first one comes before ``end``.

        A bit that is made where it is needed, since all of them would take registers.
        """
        return arith.cmpi(arith.CmpIPredicate.slt, arith.addi(self.number, i32(behind)), end)


def known_behind(result: ir.Value, number: ir.Value) -> ir.Value:
    """A number of which the compiler does not know that it is the same one, and only behind a word that it waits for.

    What is computed from it does not take registers till then.
    """
    return arithmetic.and_or(result, hopper.unknown_zero(), number)


class BlockSteps(Steps):
    """Steps of a block of threads that takes ``SCALE_TOKENS`` tokens of a kv head, which share a scale.

    Blocks are counted per sequence, kv head and, last, along the tokens; what a sequence's last one has too much does
    not exist.
    """

    def __init__(self, shape: AppendShape) -> None:
        super().__init__(shape)
        self.blocks = -(-shape.tokens // SCALE_TOKENS)  # of a sequence and head
        self.behind = range(0, SCALE_TOKENS, shape.units)  # a lane's first token, each of its tokens

    def _sequence(self, block: ir.Value) -> ir.Value:
        """Of a block."""
        return arith.divui(block, i32(self.blocks * self.shape.kv_heads))

    def _tokens(self, lanes: Lanes, block: ir.Value, start: ir.Value, length: ir.Value) -> Tokens:
        """Of a lane, given where its sequence's tokens begin in the cache, and how many are real."""
        s, sequence = self.shape, self._sequence(block)
        row, number = arith.divui(block, i32(self.blocks)), arith.remui(block, i32(self.blocks))
        head = arith.remui(row, i32(s.kv_heads))
        number = arith.muli(number, i32(SCALE_TOKENS))
        number = arith.addi(number, lanes.unit())
        real = arith.minsi(length, i32(s.tokens))
        kept = arith.minsi(real, arith.subi(i32(s.slots), start))
        first, slot = arith.addi(arith.muli(sequence, i32(s.tokens)), number), arith.addi(start, number)
        return Tokens(row, head, first, slot, number, i32(s.tokens), s.tokens % SCALE_TOKENS == 0, real, kept)

    def _spread(self, lanes: Lanes, peaks: Iterator[ir.Value]) -> list[ir.Value]:
        """Signed peaks of units, given those of what a lane has of each of its tokens.

        A lane gets one of every ``SPREAD``.
        """
        counts = [len(self.behind[i : i + SPREAD]) for i in range(0, len(self.behind), SPREAD)]
        return [lanes.spread(peaks, count, arith.maxui) for count in counts]

    def _write_scales(
        self, lanes: Lanes, norm: float, peaks: Sequence[ir.Value], its: Tokens, target: InCache
    ) -> tuple[list[Callable[[], ir.Value]], ir.Value]:
        """Writes the cache's scales of a lane's tokens, given what :meth:`_spread` gives.

        Returns:
          What gives one over the scale of each; and the largest magnitude, as a word, of some of the real ones: other
          lanes have those of others.
        """
        s, word = self.shape, ir.IntegerType.get_signless(32)
        factors: list[Callable[[], ir.Value]] = []
        magnitudes = []
        for first, peak in zip(range(0, len(self.behind), SPREAD), peaks, strict=True):
            count = len(self.behind[first : first + SPREAD])
            magnitude, in_bf16, factor = self._cache_scale(peak, norm)
            mine = arith.muli(lanes.number(count), i32(s.units))
            number = arith.addi(its.number, arith.addi(mine, i32(self.behind[first])))
            kept = arith.cmpi(arith.CmpIPredicate.slt, number, its.kept)
            kept = arith.andi(kept, lanes.is_first(count))
            behind = arith.extui(ir.IntegerType.get_signless(64), arith.muli(mine, i32(2)))
            address = arith.addi(target.scale.address, behind)
            store_half(Row(address, 2 * self.behind[first], kept), in_bf16)
            real = arith.cmpi(arith.CmpIPredicate.slt, number, its.real)
            magnitudes.append(arith.select(real, arith.bitcast(word, magnitude), i32(0)))
            factors += [functools.partial(lanes.of_number, factor, i, count) for i in range(count)]
        return factors, balanced(magnitudes, arith.maxui)

    def _share_scale(self, peak: ir.Value, scales: Any, scratch: Any, block: Any, largest: float) -> ir.Value:
        """One over the block's common scale, which is written, too; ``peak`` is a thread's magnitude, as a word."""
        word = ir.IntegerType.get_signless(32)
        thread, base = hopper.thread_anew(), hopper.shared_address(scratch)
        lane, warp = arith.andi(thread, i32(31)), arith.shrui(thread, i32(5))
        first = arith.cmpi(arith.CmpIPredicate.eq, lane, i32(0))
        peak = hopper.largest_across_warp(peak)
        hopper.store_shared(arith.addi(base, arith.muli(warp, i32(4))), [peak], condition=first)
        hopper.block_barrier()
        number = arith.andi(lane, i32(self.shape.warps - 1))
        [peak] = hopper.load_shared(arith.addi(base, arith.muli(number, i32(4))), words=1)
        peak = arith.bitcast(ir.F32Type.get(), hopper.largest_across_warp(peak))
        scale = e4m3_scale(peak, largest)
        # Up to a power of two; a NaN stays one.
        above = arith.addi(arith.bitcast(word, scale), i32(MANTISSA))
        above = arith.bitcast(ir.F32Type.get(), arith.andi(above, i32(~MANTISSA)))
        scale = arith.select(arith.cmpf(arith.CmpFPredicate.OEQ, scale, scale), above, scale)
        first = arith.cmpi(arith.CmpIPredicate.eq, thread, i32(0))
        hopper.store_global(hopper.global_address(scales, 4, (block, 1)), [scale], condition=first)
        return arithmetic.reciprocal(scale)

    def _place(self, held: Any, number: int) -> tuple[ir.Value, int]:
        """Where a thread has four registers of that number in shared memory, those of a block's threads together."""
        own = arith.addi(hopper.shared_address(held), arith.muli(utils.thread_idx(), i32(16)))
        return own, 16 * self.shape.threads * number

    def _hold(self, held: Any, number: int, registers: Sequence[ir.Value]) -> None:
        """Puts a thread's registers of a token, four or a multiple, into shared memory."""
        fours = len(registers) // 4
        for j in range(fours):
            own, offset = self._place(held, fours * number + j)
            hopper.store_shared(own, registers[4 * j : 4 * j + 4], offset)
        # Or ptxas would keep all of them in registers for as long as it can.
        hopper.asm("bar.warp.sync 0xffffffff;", "", [], [])

    def _held(self, held: Any, number: int, fours: int = 1) -> list[ir.Value]:
        """What :meth:`_hold` put there, as words."""
        # Or ptxas would load those of all tokens at once.
        hopper.asm("bar.warp.sync 0xffffffff;", "", [], [])
        return [w for j in range(fours) for w in hopper.load_shared(*self._place(held, fours * number + j))]

    def _shared_tables(self, scale: Any, offset: Any, scratch: Any, kv_head: ir.Value) -> KeyTables:
        """Those of a kv head, which are then in ``scratch`` for all of the block.

        A lane that made its reciprocals anew for each token would wait for the units that do, and has no registers for
        them.
        """
        s, d, thread = self.shape, self.shape.head_dim, utils.thread_idx()
        base = arith.addi(hopper.shared_address(scratch), i32(4 * s.warps))
        has_one = arith.cmpi(arith.CmpIPredicate.ult, thread, i32(d))
        kinds = [(scale, arithmetic.approximate_reciprocal)] * s.scaled + [(offset, arith.negf)] * s.mixed
        for number, (table, made_of) in enumerate(kinds):
            address = hopper.global_address(table, 4, (kv_head, d), (thread, 1))
            [entry] = to_floats(hopper.load_global(1, address, has_one), 4)
            place = arith.addi(base, arith.muli(thread, i32(4)))
            hopper.store_shared(place, [made_of(entry)], 4 * d * number, has_one)
        if kinds:
            hopper.block_barrier()
        own = arith.addi(base, arith.muli(self.read.column(), i32(4)))

        def load(number: int) -> list[ir.Value]:
            places = [4 * (d * number + group * self.read.apart) for group in range(2)]
            return to_floats([word for place in places for word in hopper.load_shared(own, place)], 4)

        return KeyTables(functools.partial(load, 0), functools.partial(load, s.scaled))

    def _codes_of(self, its: Tokens, place: InCache, behind: int) -> Row:
        """Where the int4 codes of the token so far behind the first one go to."""
        return place.codes.behind(behind * self.shape.head_dim // 2)._replace(exists=its.among(its.kept, behind))

    def _rounded_if_real(
        self, values: Sequence[ir.Value], factor: ir.Value, its: Tokens, behind: int
    ) -> list[ir.Value]:  # fmt: skip
        """The words of e4m3 of a token; zeros of padding."""
        real = its.among(its.real, behind)
        return [arith.select(real, word, i32(0)) for word in rounded(values, factor)]

    def keys(self) -> Operation:
        """Appends a block's keys of a prompt, and writes them in e4m3 over a common scale.

        ``(k, cosines, sines, scale, offset, codes, scales, starts, lengths, k8, k8_scale, scratch, held, block) -> ()``
        """
        s, d = self.shape, self.shape.head_dim
        fours = 2 * EACH // 4  # of a unit's registers, in shared memory

        @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 13, self.scalar), return_type=())
        def keys(
            _: Any, k: Any, cosines: Any, sines: Any, scale: Any, offset: Any, codes: Any, scales: Any, starts: Any,
            lengths: Any, k8: Any, k8_scale: Any, scratch: Any, held: Any, block: Any,
        ) -> Any:  # fmt: skip
            block = block.registers.item()
            place = [self._word(ref, self._sequence(block)) for ref in (starts, lengths)]
            its = self._tokens(self.read, block, *place)
            row = arith.addi(arith.muli(its.first, i32(s.kv_heads)), its.head)
            source = self._row(self.read, k, 2, row)
            angles = [self._row(self.read, x, 4, its.first, d // 2) for x in (cosines, sines)]

            def load(behind: int) -> tuple[list[ir.Value], tuple[list[ir.Value], list[ir.Value]]]:
                exists = its.in_sequence(behind)
                here = source.behind(behind * s.kv_heads * 2 * d)._replace(exists=exists)
                cos, sin = (x.behind(behind * 2 * d)._replace(exists=exists) for x in angles)
                return self._load(here, 2), self._rotation(cos, sin)

            def peaks() -> Iterator[ir.Value]:
                following, in_turn = load(0), InTurn()
                tables = self._shared_tables(scale, offset, scratch, its.head)
                for i in range(len(self.behind)):
                    words, rotation = following
                    if i + 1 < len(self.behind):
                        following = load(self.behind[i + 1])
                    values = self._key(in_turn.to_floats(words), rotation, tables)
                    self._hold(held, i, values)
                    peak = signed_peak(values)
                    in_turn.comes_first(peak)
                    yield peak

            spread, lanes = self._spread(self.made, peaks()), self.made.anew()
            block = known_behind(spread[0], block)
            made = self._tokens(lanes, block, *place)
            row = arith.addi(arith.muli(made.first, i32(s.kv_heads)), made.head)
            in_cache, target = self._in_cache(lanes, codes, scales, made.row, made.slot), self._row(lanes, k8, 1, row)
            factors, peak = self._write_scales(lanes, self.norm, spread, made, in_cache)
            factor = self._share_scale(peak, k8_scale, scratch, block, KEY_MAX)
            if s.mixed:
                factor = arith.mulf(factor, f32(self.norm))
            for i, behind in enumerate(self.behind):
                values = to_floats(self._held(held, i, fours), 4)
                self._store_codes(lanes, self._codes_of(made, in_cache, behind), values, factors[i]())
                here = target.behind(behind * s.kv_heads * d)._replace(exists=made.in_sequence(behind))
                self._store_e4m3(here, self._rounded_if_real(values, factor, made, behind))
            return ()

        return cast(Operation, keys)

    def values(self) -> Operation:
        """Appends a block's values of a prompt, and writes them in e4m3 over a common scale, a row per channel.

        ``(v, codes, scales, starts, lengths, v8, v8_scale, scratch, held, block) -> ()``
        """
        s, d = self.shape, self.shape.head_dim

        @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 9, self.scalar), return_type=())
        def values(
            _: Any, v: Any, codes: Any, scales: Any, starts: Any, lengths: Any, v8: Any, v8_scale: Any, scratch: Any,
            held: Any, block: Any,
        ) -> Any:  # fmt: skip
            block = block.registers.item()
            place = [self._word(ref, self._sequence(block)) for ref in (starts, lengths)]
            its = self._tokens(self.values_held, block, *place)
            row = arith.addi(arith.muli(its.first, i32(s.kv_heads)), its.head)
            source = self._row(self.values_held, v, 2, row)

            def load(behind: int) -> list[ir.Value]:
                here = source.behind(behind * s.kv_heads * 2 * d)._replace(exists=its.in_sequence(behind))
                return self._load(here, 2)

            def peaks() -> Iterator[ir.Value]:
                coming = [load(behind) for behind in self.behind[:AHEAD]]
                for i in range(len(self.behind)):
                    words = coming.pop(0)
                    if i + AHEAD < len(self.behind):
                        coming.append(load(self.behind[i + AHEAD]))
                    self._hold(held, i, words)
                    yield signed_peak_of_bf16(words)

            spread, lanes = self._spread(self.values_held, peaks()), self.values_held.anew()
            block = known_behind(spread[0], block)
            its = self._tokens(lanes, block, *place)
            in_cache = self._in_cache(lanes, codes, scales, its.row, its.slot)
            factors, peak = self._write_scales(lanes, 1.0, spread, its, in_cache)
            factor = self._share_scale(peak, v8_scale, scratch, block, E4M3_MAX)
            turned = arith.addi(hopper.shared_address(held), i32(2 * d * SCALE_TOKENS))  # behind what is held
            for i, behind in enumerate(self.behind):
                values = to_floats(self._held(held, i), 2)
                self._store_codes(lanes, self._codes_of(its, in_cache, behind), values, factors[i]())
                self._turn(self._rounded_if_real(values, factor, its, behind), turned, behind)
            hopper.block_barrier()
            self._write_turned(turned, v8, block)
            return ()

        return cast(Operation, values)

    def _swizzle(self, row: ir.Value) -> ir.Value:
        """What the numbers of a row's words are turned by: other banks for the rows that a warp writes at once."""
        return arith.muli(arith.shrui(row, i32(2)), i32(128 // self.shape.head_dim))

    def _turn(self, halves: Sequence[ir.Value], turned: ir.Value, behind: int) -> None:
        """Puts a lane's e4m3, a word of each half, into shared memory, a row per channel, at the address ``turned``.

        Tokens come to the places that :func:`pallas_kernels.reference_rotation.transpose_values` gives them. The lanes
        of a token and of the next one exchange halves, so that each writes two tokens at once.
        """
        d, lanes = self.shape.head_dim, self.shape.lanes
        number = arith.addi(arith.divui(utils.thread_idx(), i32(lanes)), i32(behind))
        second = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(number, i32(1)), i32(0))
        low_half, high_half = halves
        received = hopper.exchange(arith.select(second, low_half, high_half), lanes)
        even = arith.select(second, received, low_half)
        odd = arith.select(second, high_half, received)
        # Of a token 16 a + 8 h + 2 i + e the place is 16 a + 4 i + 2 h + e; of the even one e is 0.
        place = arith.andi(number, i32(SCALE_TOKENS - 16))
        place = arith.addi(place, arith.shli(arith.andi(arith.shrui(number, i32(1)), i32(3)), i32(2)))
        place = arith.addi(place, arith.shli(arith.andi(arith.shrui(number, i32(3)), i32(1)), i32(1)))
        row = self.values_held.column()
        row = arith.addi(row, arith.muli(arith.andi(number, i32(1)), i32(d // 2)))
        place = arith.xori(place, arith.shli(self._swizzle(row), i32(2)))
        base = arith.addi(turned, arith.addi(arith.muli(row, i32(SCALE_TOKENS)), place))
        for i in range(0, EACH, 2):
            pairs = arithmetic.permute(even, odd, 0x5140 + 0x2222 * (i // 2))
            hopper.asm(
                "{ .reg .b16 l, h; mov.b32 {l, h}, $1; "
                f"st.shared.b16 [$0+{i * SCALE_TOKENS}], l; st.shared.b16 [$0+{(i + 1) * SCALE_TOKENS}], h; }}",
                "r,r", [base, pairs], [],
            )  # fmt: skip

    def _write_turned(self, turned: ir.Value, v8: Any, block: ir.Value) -> None:
        """Writes what all threads put into shared memory, ``SCALE_TOKENS`` bytes of each channel."""
        d, warps, word = self.shape.head_dim, self.shape.warps, ir.IntegerType.get_signless(32)
        head, number = arith.divui(block, i32(self.blocks)), arith.remui(block, i32(self.blocks))
        lane, warp = arith.andi(utils.thread_idx(), i32(31)), arith.shrui(utils.thread_idx(), i32(5))
        column = arith.addi(arith.muli(number, i32(SCALE_TOKENS)), arith.muli(lane, i32(4)))
        row_bytes = self.blocks * SCALE_TOKENS
        first_row = arith.addi(arith.muli(head, i32(d)), warp)
        target = hopper.global_address(v8, 1, (first_row, row_bytes), (column, 1))
        source = arith.addi(turned, arith.muli(warp, i32(SCALE_TOKENS)))
        for i in range(d // warps):  # a row for each warp
            row = arith.addi(warp, i32(i * warps))
            place = arith.shli(arith.xori(lane, self._swizzle(row)), i32(2))
            address = arith.addi(source, place)
            [four] = hopper.asm(f"ld.shared.b32 $0, [$1+{i * warps * SCALE_TOKENS}];", "=r,r", [address], [word])
            hopper.store_global(target, [four], i * warps * row_bytes)
