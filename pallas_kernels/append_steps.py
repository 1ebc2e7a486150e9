"""The register-level steps of :mod:`pallas_kernels.mosaic_append`."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import hopper
from pallas_kernels.hopper import f32, i32
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.packing import INT4_MAX, INT4_MIN
from pallas_kernels.reference import SCALE_TOKENS
from pallas_kernels.row_steps import across_block, balanced, e4m3_scale, from_bf16x2, largest_magnitude

WARPS = 4  # of a block, each with a head of a token
VALUES_PITCH = SCALE_TOKENS + 4  # bytes from a channel to the next one, so that lanes write to different banks


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
    """

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    slots: int


class Steps:
    """The register-level steps for one shape.

    Lane l holds the channels n l to n l + n - 1 of a head's first half and as many of its second; n is 1 or 2.
    """

    def __init__(self, shape: AppendShape) -> None:
        self.shape = shape
        self.each = shape.head_dim // 64  # channels of a half that a lane holds
        self.scalar = plgpu.Layout.WG_SPLAT(())
        self.layout = hopper.container_layout(2 * self.each)
        self.type = hopper.container_type(2 * self.each, jnp.float32)
        self.single_layout, self.single_type = hopper.container_layout(1), hopper.container_type(1, jnp.float32)

    def _lane(self) -> ir.Value:
        return arith.andi(utils.thread_idx(), i32(31))

    def _unit(self, first: Any, heads: int) -> tuple[ir.Value, ir.Value, ir.Value]:
        """A warp's token (counted over all sequences) and head, and whether there is such a pair."""
        unit = arith.addi(first.registers.item(), arith.shrui(utils.thread_idx(), i32(5)))
        count = self.shape.batch * self.shape.tokens * heads
        exists = arith.cmpi(arith.CmpIPredicate.ult, unit, i32(count))
        unit = arith.minui(unit, i32(count - 1))
        return arith.divui(unit, i32(heads)), arith.remui(unit, i32(heads)), exists

    def _load_pairs(self, ref: Any, row: ir.Value, columns: int, dtype: Any) -> list[ir.Value]:
        """A lane's channels of a row; of one of ``head_dim / 2`` columns only one half."""
        size = jnp.dtype(dtype).itemsize
        values = []
        for half in range(2 * columns // self.shape.head_dim):
            at = arith.addi(arith.muli(self._lane(), i32(self.each)), i32(half * self.shape.head_dim // 2))
            address = hopper.global_address(ref, size, (row, columns), (at, 1))
            values += load_floats(address, self.each, size)
        return values

    def load(self, heads: int) -> Operation:
        """``(x, first unit) -> values``: each warp's head, in float32."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), self.scalar), return_type=self.type)
        def read(_: Any, x: Any, first: Any) -> Any:
            token, head, _exists = self._unit(first, heads)
            row = arith.addi(arith.muli(token, i32(heads)), head)
            return hopper.pack(self._load_pairs(x, row, self.shape.head_dim, jnp.bfloat16))

        return cast(Operation, read)

    def rotate(self, heads: int) -> Operation:
        """``(values, cosines, sines, first unit) -> values``: rotates the pairs (i, i + d / 2)."""

        @plgpu.inline_mgpu(
            arg_types=(self.layout, plgpu.RefType(), plgpu.RefType(), self.scalar), return_type=self.type
        )
        def rotate(_: Any, values: Any, cosines: Any, sines: Any, first: Any) -> Any:
            token, _head, _exists = self._unit(first, heads)
            registers = hopper.unpack(values)
            low, high = registers[: self.each], registers[self.each :]
            cos = self._load_pairs(cosines, token, self.shape.head_dim // 2, jnp.float32)
            sin = self._load_pairs(sines, token, self.shape.head_dim // 2, jnp.float32)
            new_low = [
                arith.subf(arith.mulf(a, c), arith.mulf(b, s)) for a, b, c, s in zip(low, high, cos, sin, strict=True)
            ]
            new_high = [
                arith.addf(arith.mulf(b, c), arith.mulf(a, s)) for a, b, c, s in zip(low, high, cos, sin, strict=True)
            ]
            return hopper.pack([*new_low, *new_high])

        return cast(Operation, rotate)

    def combine(self, heads: int, operation: Literal["times", "over", "minus"]) -> Operation:
        """``(values, table [kv heads, d] float32, first unit) -> values``: combined with the row of the kv head."""

        @plgpu.inline_mgpu(arg_types=(self.layout, plgpu.RefType(), self.scalar), return_type=self.type)
        def combine(_: Any, values: Any, table: Any, first: Any) -> Any:
            _token, head, _exists = self._unit(first, heads)
            kv_head = arith.divui(head, i32(heads // self.shape.kv_heads))
            row = self._load_pairs(table, kv_head, self.shape.head_dim, jnp.float32)
            if operation == "over":
                row = [hopper.divide(f32(1), r) for r in row]
            apply = arith.subf if operation == "minus" else arith.mulf
            return hopper.pack([apply(a, b) for a, b in zip(hopper.unpack(values), row, strict=True)])

        return cast(Operation, combine)

    def mix(self) -> Operation:
        """``values -> values``: times the orthonormal Hadamard matrix of Sylvester's construction."""

        @plgpu.inline_mgpu(arg_types=(self.layout,), return_type=self.type)
        def mix(_: Any, values: Any) -> Any:
            registers = hopper.unpack(values)
            # A butterfly per bit of the channel's number: in registers, then between lanes.
            stride = 1
            while stride < len(registers):
                new = list(registers)
                for i in range(len(registers)):
                    if not i & stride:
                        new[i] = arith.addf(registers[i], registers[i + stride])
                        new[i + stride] = arith.subf(registers[i], registers[i + stride])
                registers, stride = new, 2 * stride
            for distance in (1, 2, 4, 8, 16):
                upper = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(self._lane(), i32(distance)), i32(0))
                others = [hopper.exchange(r, distance) for r in registers]
                registers = [
                    arith.select(upper, arith.subf(o, r), arith.addf(r, o))
                    for r, o in zip(registers, others, strict=True)
                ]
            return hopper.pack([arith.mulf(r, f32(1 / math.sqrt(self.shape.head_dim))) for r in registers])

        return cast(Operation, mix)

    def _rounded(self, registers: Sequence[ir.Value], scale: ir.Value) -> list[ir.Value]:
        """A lane's channels of the first and of the second half, over the scale, as e4m3 in the lowest bytes."""
        word = ir.IntegerType.get_signless(32)
        convert = "{ .reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; mov.b16 h, 0; mov.b32 $0, {l, h}; }"
        quotients = hopper.divide_all(registers, scale)
        if self.each == 1:  # a byte of each half
            pair = hopper.pure_asm(convert, "=r,f,f", quotients, word)
            return [pair, arith.shrui(pair, i32(8))]
        return [hopper.pure_asm(convert, "=r,f,f", quotients[2 * i : 2 * i + 2], word) for i in range(2)]

    def _store_row(
        self, x8: Any, row: ir.Value, registers: Sequence[ir.Value], scale: ir.Value, exists: ir.Value
    ) -> None:  # fmt: skip
        """Writes a warp's head to a row of ``head_dim`` e4m3."""
        d = self.shape.head_dim
        for half, part in enumerate(self._rounded(registers, scale)):
            at = arith.addi(arith.muli(self._lane(), i32(self.each)), i32(half * d // 2))
            store_bytes(
                hopper.global_address(x8, 1, (row, d), (at, 1)),
                part,
                self.each,
                arith.extui(ir.IntegerType.get_signless(32), exists),
            )

    def store_queries(self) -> Operation:
        """``(values, q8, q_scale, first unit) -> ()``: e4m3 with the scale ``max|x| / 448``, or 1 of zeros."""
        heads = self.shape.heads

        @plgpu.inline_mgpu(arg_types=(self.layout, plgpu.RefType(), plgpu.RefType(), self.scalar), return_type=())
        def store(_: Any, values: Any, q8: Any, q_scale: Any, first: Any) -> Any:
            word = ir.IntegerType.get_signless(32)
            token, head, exists = self._unit(first, heads)
            registers = hopper.unpack(values)
            peak = hopper.across_lanes(largest_magnitude(registers), hopper.maximum_or_nan)
            scale = e4m3_scale(peak)
            row = arith.addi(arith.muli(token, i32(heads)), head)
            self._store_row(q8, row, registers, scale, exists)
            first_lane = arith.cmpi(arith.CmpIPredicate.eq, self._lane(), i32(0))
            hopper.asm(
                "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.f32 [$0], $1; }", "l,f,r",
                [
                    hopper.global_address(q_scale, 4, (row, 1)), scale,
                    arith.extui(word, arith.andi(first_lane, exists)),
                ], [],
            )  # fmt: skip
            return ()

        return cast(Operation, store)

    def store_codes(self) -> Operation:
        """``(values, codes, scales, starts, lengths, first unit) -> ()``: int4 like ``quantize_kv``'s, to its slot."""
        s = self.shape

        @plgpu.inline_mgpu(arg_types=(self.layout, *[plgpu.RefType()] * 4, self.scalar), return_type=())
        def store(_: Any, values: Any, codes: Any, scales: Any, starts: Any, lengths: Any, first: Any) -> Any:
            word, single = ir.IntegerType.get_signless(32), ir.F32Type.get()
            token, head, exists = self._unit(first, s.kv_heads)
            registers = hopper.unpack(values)
            highest = hopper.across_lanes(balanced(registers, hopper.maximum_or_nan), hopper.maximum_or_nan)
            negative = [arith.subf(f32(0), r) for r in registers]
            # Minus the lowest.
            depth = hopper.across_lanes(balanced(negative, hopper.maximum_or_nan), hopper.maximum_or_nan)
            peak = hopper.maximum_or_nan(highest, depth)
            zero = arith.cmpf(arith.CmpFPredicate.OEQ, peak, f32(0))
            magnitude = arith.select(zero, f32(1), arith.mulf(peak, f32(-1 / INT4_MIN)))
            larger = arith.cmpf(arith.CmpFPredicate.OGT, highest, depth)
            scale = arith.select(larger, arith.subf(f32(0), magnitude), magnitude)
            rounded = hopper.to_bf16x2(scale, f32(0))
            scale = arith.bitcast(single, arith.shli(rounded, i32(16)))
            nibbles = []
            for quotient in hopper.divide_all(registers, scale):
                code = hopper.pure_asm("cvt.rni.s32.f32 $0, $1;", "=r,f", [quotient], word)
                code = arith.minsi(arith.maxsi(code, i32(INT4_MIN)), i32(INT4_MAX))
                nibbles.append(arith.andi(code, i32(0xF)))
            sequence, number = arith.divui(token, i32(s.tokens)), arith.remui(token, i32(s.tokens))
            start, length = (load_word(hopper.global_address(ref, 4, (sequence, 1))) for ref in (starts, lengths))
            slot = arith.addi(start, number)
            real = arith.andi(
                arith.cmpi(arith.CmpIPredicate.slt, number, length),
                arith.cmpi(arith.CmpIPredicate.slt, slot, i32(s.slots)),
            )
            real = arith.andi(real, exists)
            slot = arith.select(real, slot, i32(0))
            row = arith.addi(arith.muli(sequence, i32(s.kv_heads)), head)
            row = arith.addi(arith.muli(row, i32(s.slots)), slot)
            half_bytes = s.head_dim // 4
            for half in range(2):
                mine = nibbles[half * self.each : (half + 1) * self.each]
                if self.each == 2:
                    byte, at, flag = arith.ori(mine[0], arith.shli(mine[1], i32(4))), self._lane(), real
                else:  # the neighbour has the other nibble
                    other = hopper.exchange(mine[0], 1)
                    byte = arith.ori(mine[0], arith.shli(other, i32(4)))
                    even = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(self._lane(), i32(1)), i32(0))
                    at, flag = arith.shrui(self._lane(), i32(1)), arith.andi(real, even)
                at = arith.addi(at, i32(half * half_bytes))
                store_bytes(
                    hopper.global_address(codes, 1, (row, s.head_dim // 2), (at, 1)), byte, 1, arith.extui(word, flag)
                )
            first_lane = arith.cmpi(arith.CmpIPredicate.eq, self._lane(), i32(0))
            store_bytes(
                hopper.global_address(scales, 2, (row, 1)), rounded, 2, arith.extui(word, arith.andi(first_lane, real))
            )
            return ()

        return cast(Operation, store)


class BlockSteps(Steps):
    """Steps of a block of threads that takes ``SCALE_TOKENS`` tokens of a kv head, which share a scale.

    A unit's number is that of its token in such a block, after all tokens of the blocks before. Blocks are counted per
    sequence, kv head and, last, along the tokens; what a sequence's last one has too much does not exist.
    """

    def __init__(self, shape: AppendShape) -> None:
        super().__init__(shape)
        self.blocks = -(-shape.tokens // SCALE_TOKENS)  # of a sequence and head

    def _position(self, first: Any) -> tuple[ir.Value, ir.Value]:
        """A warp's sequence and head as one number, and its token in the sequence."""
        unit = arith.addi(first.registers.item(), arith.shrui(utils.thread_idx(), i32(5)))
        size = i32(self.blocks * SCALE_TOKENS)
        return arith.divui(unit, size), arith.remui(unit, size)

    def _unit(self, first: Any, heads: int) -> tuple[ir.Value, ir.Value, ir.Value]:
        rest, number = self._position(first)
        exists = arith.cmpi(arith.CmpIPredicate.ult, number, i32(self.shape.tokens))
        number = arith.minui(number, i32(self.shape.tokens - 1))
        token = arith.addi(arith.muli(arith.divui(rest, i32(heads)), i32(self.shape.tokens)), number)
        return token, arith.remui(rest, i32(heads)), exists

    def keep_real(self) -> Operation:
        """``(values, lengths, first unit) -> values``: zeros behind the real tokens."""

        @plgpu.inline_mgpu(arg_types=(self.layout, plgpu.RefType(), self.scalar), return_type=self.type)
        def keep(_: Any, values: Any, lengths: Any, first: Any) -> Any:
            rest, number = self._position(first)
            sequence = arith.divui(rest, i32(self.shape.kv_heads))
            length = load_word(hopper.global_address(lengths, 4, (sequence, 1)))
            real = arith.andi(
                arith.cmpi(arith.CmpIPredicate.slt, number, length),
                arith.cmpi(arith.CmpIPredicate.ult, number, i32(self.shape.tokens)),
            )
            return hopper.pack([arith.select(real, r, f32(0)) for r in hopper.unpack(values)])

        return cast(Operation, keep)

    def peak(self) -> Operation:
        """``(values, peak) -> peak``: the largest magnitude that a thread has seen."""

        @plgpu.inline_mgpu(arg_types=(self.layout, self.single_layout), return_type=self.single_type)
        def grow(_: Any, values: Any, peak: Any) -> Any:
            [before] = hopper.unpack(peak)
            return hopper.pack([hopper.maximum_or_nan(before, largest_magnitude(hopper.unpack(values)))])

        return cast(Operation, grow)

    def share_scale(self) -> Operation:
        """``(peak, scales, scratch, block) -> scale``: the threads' common scale, written to its place, too."""

        @plgpu.inline_mgpu(
            arg_types=(self.single_layout, plgpu.RefType(), plgpu.RefType(), self.scalar), return_type=self.single_type
        )
        def share(_: Any, peak: Any, scales: Any, scratch: Any, block: Any) -> Any:
            word = ir.IntegerType.get_signless(32)
            [mine] = hopper.unpack(peak)
            scale = e4m3_scale(across_block(mine, scratch, WARPS, hopper.maximum_or_nan))
            first = arith.cmpi(arith.CmpIPredicate.eq, utils.thread_idx(), i32(0))
            hopper.asm(
                "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.f32 [$0], $1; }", "l,f,r",
                [hopper.global_address(scales, 4, (block.registers.item(), 1)), scale, arith.extui(word, first)], [],
            )  # fmt: skip
            return hopper.pack([scale])

        return cast(Operation, share)

    def store_keys(self) -> Operation:
        """``(values, scale, k8, first unit) -> ()``."""
        heads = self.shape.kv_heads

        @plgpu.inline_mgpu(
            arg_types=(self.layout, self.single_layout, plgpu.RefType(), self.scalar), return_type=()
        )  # fmt: skip
        def store(_: Any, values: Any, scale: Any, k8: Any, first: Any) -> Any:
            token, head, exists = self._unit(first, heads)
            row = arith.addi(arith.muli(token, i32(heads)), head)
            self._store_row(k8, row, hopper.unpack(values), hopper.unpack(scale)[0], exists)
            return ()

        return cast(Operation, store)

    def hold_values(self) -> Operation:
        """``(values, scale, tile, first unit) -> ()``: into shared memory, a row per channel.

        Tokens come to the places that :func:`pallas_kernels.reference.transpose_values` gives them.
        """
        half_rows = self.shape.head_dim // 2

        @plgpu.inline_mgpu(
            arg_types=(self.layout, self.single_layout, plgpu.RefType(), self.scalar), return_type=()
        )  # fmt: skip
        def hold(_: Any, values: Any, scale: Any, tile: Any, first: Any) -> Any:
            _rest, number = self._position(first)
            number = arith.andi(number, i32(SCALE_TOKENS - 1))
            # Of a token 16 a + 8 h + 2 i + e the place is 16 a + 4 i + 2 h + e.
            place = arith.andi(number, i32(~14 & 127))
            place = arith.addi(place, arith.shli(arith.andi(arith.shrui(number, i32(1)), i32(3)), i32(2)))
            place = arith.addi(place, arith.shli(arith.andi(arith.shrui(number, i32(3)), i32(1)), i32(1)))
            base = arith.addi(hopper.shared_address(tile), place)
            for half, part in enumerate(self._rounded(hopper.unpack(values), hopper.unpack(scale)[0])):
                for i in range(self.each):
                    row = arith.addi(arith.muli(self._lane(), i32(self.each)), i32(half * half_rows + i))
                    hopper.asm(
                        "{ .reg .b16 l, h; mov.b32 {l, h}, $1; st.shared.b8 [$0], l; }", "r,r",
                        [arith.addi(base, arith.muli(row, i32(VALUES_PITCH))), arith.shrui(part, i32(8 * i))], [],
                    )  # fmt: skip
            return ()

        return cast(Operation, hold)

    def write_values(self) -> Operation:
        """``(tile, v8, block) -> ()``: what all threads hold, ``SCALE_TOKENS`` bytes of each channel."""
        d = self.shape.head_dim

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), self.scalar), return_type=())
        def write(_: Any, tile: Any, v8: Any, block: Any) -> Any:
            word = ir.IntegerType.get_signless(32)
            hopper.block_barrier()
            head, block = arith.divui(block.registers.item(), i32(self.blocks)), block.registers.item()
            number = arith.subi(block, arith.muli(head, i32(self.blocks)))
            column = arith.addi(arith.muli(number, i32(SCALE_TOKENS)), arith.muli(self._lane(), i32(4)))
            warp = arith.shrui(utils.thread_idx(), i32(5))
            source = arith.addi(hopper.shared_address(tile), arith.muli(self._lane(), i32(4)))
            source = arith.addi(source, arith.muli(warp, i32(VALUES_PITCH)))
            for i in range(d // WARPS):
                row = arith.addi(arith.addi(arith.muli(head, i32(d)), warp), i32(i * WARPS))
                offset = i * WARPS * VALUES_PITCH
                [four] = hopper.asm(f"ld.shared.b32 $0, [$1+{offset}];", "=r,r", [source], [word])
                target = hopper.global_address(v8, 1, (row, self.blocks * SCALE_TOKENS), (column, 1))
                hopper.asm("st.global.b32 [$0], $1;", "l,r", [target, four], [])
            return ()

        return cast(Operation, write)


def load_word(address: ir.Value) -> ir.Value:
    """A word of global memory."""
    return hopper.asm("ld.global.nc.b32 $0, [$1];", "=r,l", [address], [ir.IntegerType.get_signless(32)])[0]


def load_floats(address: ir.Value, count: int, size: int) -> list[ir.Value]:
    """One or two neighbouring bf16 or float32."""
    word, single = ir.IntegerType.get_signless(32), ir.F32Type.get()
    if size == 4:
        vector, listed = (".v2", "{$0, $1}") if count == 2 else ("", "$0")
        ptx = f"ld.global.nc{vector}.b32 {listed}, [${count}];"
        words = hopper.asm(ptx, ",".join(["=r"] * count + ["l"]), [address], [word] * count)
        return [arith.bitcast(single, w) for w in words]
    if count == 2:
        return from_bf16x2(load_word(address))
    [half] = hopper.asm("{ .reg .b16 h; ld.global.nc.b16 h, [$1]; cvt.u32.u16 $0, h; }", "=r,l", [address], [word])
    return [arith.bitcast(single, arith.shli(half, i32(16)))]


def store_bytes(address: ir.Value, word: ir.Value, count: int, flag: ir.Value) -> None:
    """The lowest one or two bytes of a word, where the flag is not 0."""
    hopper.asm(
        "{ .reg .pred p; .reg .b16 l, h; setp.ne.b32 p, $2, 0; mov.b32 {l, h}, $1; "
        f"@p st.global.b{8 * count} [$0], l; }}",
        "l,r,r", [address, word, flag], [],
    )  # fmt: skip
