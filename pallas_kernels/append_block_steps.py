"""The register-level steps of :mod:`pallas_kernels.mosaic_append` for a prompt, whose keys and values are e4m3, too.

A block of threads takes as many tokens of a head as share a scale, and holds them until it is known.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import arithmetic, hopper
from pallas_kernels.append_steps import EACH, AppendShape, InCache, Steps, rounded
from pallas_kernels.hopper import f32, i32
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.reference import E4M3_MAX
from pallas_kernels.reference_rotation import KEY_MAX, MANTISSA, SCALE_TOKENS
from pallas_kernels.row_steps import across_block, balanced, e4m3_scale, to_floats

AHEAD = 4  # tokens of values that are on their way


class Tokens(NamedTuple):
    """A lane's tokens in a block of a prompt's.

    Attributes:
      row: the sequence and kv head, as one number.
      head: the kv head.
      first: the first token, counted over all sequences.
      slot: of the first token in the cache.
      number: of the first token in its sequence.
      tokens: of a sequence, with padding.
      real: those without padding.
      kept: those of them that the cache has slots for.
    """

    row: ir.Value
    head: ir.Value
    first: ir.Value
    slot: ir.Value
    number: ir.Value
    tokens: ir.Value
    real: ir.Value
    kept: ir.Value

    def among(self, end: ir.Value, behind: int) -> ir.Value:
        """Whether the token so far behind the first one comes before ``end``.

        A bit that is made where it is needed, since all of them would take registers.
        """
        return arith.cmpi(arith.CmpIPredicate.slt, arith.addi(self.number, i32(behind)), end)


class BlockSteps(Steps):
    """Steps of a block of threads that takes ``SCALE_TOKENS`` tokens of a kv head, which share a scale.

    Blocks are counted per sequence, kv head and, last, along the tokens; what a sequence's last one has too much does
    not exist.
    """

    def __init__(self, shape: AppendShape) -> None:
        super().__init__(shape)
        self.blocks = -(-shape.tokens // SCALE_TOKENS)  # of a sequence and head
        self.behind = range(0, SCALE_TOKENS, shape.units)  # a lane's first token, each of its tokens

    def _tokens(self, block: Any, starts: Any, lengths: Any) -> Tokens:
        s = self.shape
        row, number = arith.divui(block, i32(self.blocks)), arith.remui(block, i32(self.blocks))
        sequence, head = arith.divui(row, i32(s.kv_heads)), arith.remui(row, i32(s.kv_heads))
        start, length = (self._word(ref, sequence) for ref in (starts, lengths))
        number = arith.muli(number, i32(SCALE_TOKENS))
        number = arith.addi(number, arith.divui(utils.thread_idx(), i32(s.lanes)))
        real = arith.minsi(length, i32(s.tokens))
        kept = arith.minsi(real, arith.subi(i32(s.slots), start))
        first = arith.addi(arith.muli(sequence, i32(s.tokens)), number)
        return Tokens(row, head, first, arith.addi(start, number), number, i32(s.tokens), real, kept)

    def _append_block(self, registers: Sequence[ir.Value], its: Tokens, target: InCache, behind: int) -> ir.Value:
        """:meth:`_append` of the token so far behind the first one, whose place ``target`` is."""
        kept, half = its.among(its.kept, behind), self.shape.head_dim // 2
        codes, scale = target.codes.behind(behind * half), target.scale.behind(behind * 2)
        return self._append(registers, InCache(codes._replace(exists=kept), scale._replace(exists=kept)))

    def _share_scale(
        self, peaks: Sequence[ir.Value], scales: Any, scratch: Any, block: Any, largest: float
    ) -> ir.Value:
        """One over the block's common scale, which is written, too."""
        word = ir.IntegerType.get_signless(32)
        peak = balanced(peaks, arithmetic.maximum_or_nan)
        scale = e4m3_scale(across_block(peak, scratch, self.shape.warps, arithmetic.maximum_or_nan), largest)
        # Up to a power of two; a NaN stays one.
        above = arith.addi(arith.bitcast(word, scale), i32(MANTISSA))
        above = arith.bitcast(ir.F32Type.get(), arith.andi(above, i32(~MANTISSA)))
        scale = arith.select(arith.cmpf(arith.CmpFPredicate.OEQ, scale, scale), above, scale)
        first = arith.cmpi(arith.CmpIPredicate.eq, utils.thread_idx(), i32(0))
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
        return [w for j in range(fours) for w in hopper.load_shared(*self._place(held, fours * number + j))]

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
            its = self._tokens(block, starts, lengths)
            tables = self._tables_of_keys(scale, offset, its.head)
            row = arith.addi(arith.muli(its.first, i32(s.kv_heads)), its.head)
            source, target = self._row(k, 2, row, d), self._row(k8, 1, row, d)
            angles = [self._row(x, 4, its.first, d // 2) for x in (cosines, sines)]
            place = self._in_cache(codes, scales, its.row, its.slot, None)

            def load(behind: int) -> tuple[list[ir.Value], tuple[list[ir.Value], list[ir.Value]]]:
                exists = its.among(its.tokens, behind)
                here = source.behind(behind * s.kv_heads * 2 * d)._replace(exists=exists)
                cos, sin = (x.behind(behind * 2 * d)._replace(exists=exists) for x in angles)
                return self._load(here, d, 2), self._rotation(cos, sin)

            following, peaks = load(0), []
            for i, behind in enumerate(self.behind):
                words, rotation = following
                if i + 1 < len(self.behind):
                    following = load(self.behind[i + 1])
                real = its.among(its.real, behind)
                if not s.mixed:
                    words = [arith.select(real, w, i32(0)) for w in words]
                values = self._key(words, rotation, *tables)
                if s.mixed:
                    values = [arith.select(real, x, f32(0)) for x in values]
                self._hold(held, i, values)
                peaks.append(self._append_block(values, its, place, behind))
            factor = self._share_scale(peaks, k8_scale, scratch, block, KEY_MAX)
            for i, behind in enumerate(self.behind):
                exists = its.among(its.tokens, behind)
                here = target.behind(behind * s.kv_heads * d)._replace(exists=exists)
                self._store_e4m3(here, to_floats(self._held(held, i, fours), 4), factor)
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
            its = self._tokens(block, starts, lengths)
            row = arith.addi(arith.muli(its.first, i32(s.kv_heads)), its.head)
            source, place = self._row(v, 2, row, d), self._in_cache(codes, scales, its.row, its.slot, None)

            def load(behind: int) -> list[ir.Value]:
                exists = its.among(its.tokens, behind)
                return self._load(source.behind(behind * s.kv_heads * 2 * d)._replace(exists=exists), d, 2)

            coming, peaks = [load(behind) for behind in self.behind[:AHEAD]], []
            for i, behind in enumerate(self.behind):
                real = its.among(its.real, behind)
                words = [arith.select(real, w, i32(0)) for w in coming.pop(0)]
                if i + AHEAD < len(self.behind):
                    coming.append(load(self.behind[i + AHEAD]))
                self._hold(held, i, words)
                peaks.append(self._append_block(to_floats(words, 2), its, place, behind))
            factor = self._share_scale(peaks, v8_scale, scratch, block, E4M3_MAX)
            turned = arith.addi(hopper.shared_address(held), i32(2 * d * SCALE_TOKENS))  # behind what is held
            for i, behind in enumerate(self.behind):
                self._turn(to_floats(self._held(held, i), 2), factor, turned, behind)
            hopper.block_barrier()
            self._write_turned(turned, v8, block)
            return ()

        return cast(Operation, values)

    def _swizzle(self, row: ir.Value) -> ir.Value:
        """What the numbers of a row's words are turned by: other banks for the rows that a warp writes at once."""
        return arith.muli(arith.shrui(row, i32(2)), i32(128 // self.shape.head_dim))

    def _turn(self, values: Sequence[ir.Value], factor: ir.Value, turned: ir.Value, behind: int) -> None:
        """Puts values into shared memory, a row per channel, at the address ``turned``.

        Tokens come to the places that :func:`pallas_kernels.reference_rotation.transpose_values` gives them. The lanes
        of a token and of the next one exchange halves, so that each writes two tokens at once.
        """
        d, lanes = self.shape.head_dim, self.shape.lanes
        number = arith.addi(arith.divui(utils.thread_idx(), i32(lanes)), i32(behind))
        second = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(number, i32(1)), i32(0))
        low_half, high_half = rounded(values, factor)
        received = hopper.exchange(arith.select(second, low_half, high_half), lanes)
        even = arith.select(second, received, low_half)
        odd = arith.select(second, high_half, received)
        # Of a token 16 a + 8 h + 2 i + e the place is 16 a + 4 i + 2 h + e; of the even one e is 0.
        place = arith.andi(number, i32(SCALE_TOKENS - 16))
        place = arith.addi(place, arith.shli(arith.andi(arith.shrui(number, i32(1)), i32(3)), i32(2)))
        place = arith.addi(place, arith.shli(arith.andi(arith.shrui(number, i32(3)), i32(1)), i32(1)))
        row = arith.muli(self._lane(), i32(EACH))
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
