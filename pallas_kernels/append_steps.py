"""The register-level steps of :mod:`pallas_kernels.mosaic_append`."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import hopper
from pallas_kernels.hopper import f32, i32
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.packing import INT4_MIN
from pallas_kernels.reference import E4M3_MAX, MANTISSA, SCALE_TOKENS
from pallas_kernels.row_steps import across_block, balanced, e4m3_scale, largest_magnitude, to_floats

EACH = 4  # neighbouring channels of each half of a head that a lane holds
SMALLEST_NORMAL = 2.0**-126  # whose reciprocal is finite
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
    """

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    warps: int

    @property
    def lanes(self) -> int:
        """That hold a head of a token, a unit."""
        return self.head_dim // (2 * EACH)

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps

    @property
    def units(self) -> int:
        """That a block holds at once."""
        return self.threads // self.lanes


class Container(NamedTuple):
    """What a container of that many registers of each thread is to Pallas."""

    registers: int
    dtype: Any

    @property
    def layout(self) -> Any:
        """As an argument of a step."""
        return hopper.container_layout(self.registers)

    @property
    def type(self) -> plgpu.ShapeDtypeStruct:
        """As a step's result."""
        return hopper.container_type(self.registers, self.dtype)

    def register_type(self) -> ir.Type:
        """That of the registers themselves."""
        return ir.F32Type.get() if self.dtype == jnp.float32 else ir.IntegerType.get_signless(32)

    def zero(self) -> ir.Value:
        """A register."""
        return f32(0) if self.dtype == jnp.float32 else i32(0)


class Steps:
    """The register-level steps for one shape.

    Lane l of a unit's holds the channels 4 l to 4 l + 3 of the head's first half, then those of its second.
    """

    def __init__(self, shape: AppendShape) -> None:
        self.shape = shape
        self.scalar = plgpu.Layout.WG_SPLAT(())
        self.values = Container(2 * EACH, jnp.float32)
        self.words = Container(EACH, jnp.int32)
        self.single = Container(1, jnp.float32)

    def _lane(self) -> ir.Value:
        """A lane's number among those of its unit."""
        return arith.andi(utils.thread_idx(), i32(self.shape.lanes - 1))

    def _is_first_lane(self) -> ir.Value:
        return arith.cmpi(arith.CmpIPredicate.eq, self._lane(), i32(0))

    def _number(self, first: Any) -> ir.Value:
        """Of a lane's unit."""
        return arith.addi(first.registers.item(), arith.divui(utils.thread_idx(), i32(self.shape.lanes)))

    def _unit(self, first: Any, heads: int) -> tuple[ir.Value, ir.Value, ir.Value]:
        """A unit's token (counted over all sequences) and head, and whether there is such a pair."""
        unit, count = self._number(first), self.shape.batch * self.shape.tokens * heads
        exists = arith.cmpi(arith.CmpIPredicate.ult, unit, i32(count))
        unit = arith.minui(unit, i32(count - 1))
        return arith.divui(unit, i32(heads)), arith.remui(unit, i32(heads)), exists

    def _load_halves(self, ref: Any, row: ir.Value, columns: int, size: int) -> list[ir.Value]:
        """Words of a lane's channels, of ``size`` bytes, of a row; of ``head_dim / 2`` columns only one half."""
        words = []
        for half in range(2 * columns // self.shape.head_dim):
            at = arith.muli(self._lane(), i32(EACH))
            address = hopper.global_address(ref, size, (row, columns), (at, 1), (half * self.shape.head_dim // 2, 1))
            words += load_words(address, EACH * size // 4)
        return words

    def _load_floats(self, ref: Any, row: ir.Value, columns: int) -> list[ir.Value]:
        """As :meth:`_load_halves`, of float32."""
        return to_floats(self._load_halves(ref, row, columns, 4), 4)

    def _across(self, value: ir.Value) -> ir.Value:
        """The largest float32 of a unit's lanes, or NaN."""
        return hopper.across_lanes(value, hopper.maximum_or_nan, self.shape.lanes)

    def opaque(self) -> Operation:
        """``number -> number``, which the compiler knows nothing of.

        It neither unrolls a loop of as many turns nor, of a loop's counter, has a pointer for every array that the
        loop goes through: either way more registers are taken than let two or three blocks share a multiprocessor.
        """

        @plgpu.inline_mgpu(
            arg_types=(self.scalar,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, self.scalar)
        )  # fmt: skip
        def opaque(_: Any, number: Any) -> Any:
            word = ir.IntegerType.get_signless(32)
            [same] = hopper.asm("mov.b32 $0, $1;", "=r,r", [number.registers.item()], [word])
            return hopper.splat(same)

        return cast(Operation, opaque)

    def load(self, heads: int) -> Operation:
        """``(x, first unit) -> words``: each unit's head, in bf16."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), self.scalar), return_type=self.words.type)
        def read(_: Any, x: Any, first: Any) -> Any:
            token, head, _exists = self._unit(first, heads)
            row = arith.addi(arith.muli(token, i32(heads)), head)
            return hopper.pack(self._load_halves(x, row, self.shape.head_dim, 2))

        return cast(Operation, read)

    def widen(self) -> Operation:
        """``words -> values``: in float32, what was loaded."""

        @plgpu.inline_mgpu(arg_types=(self.words.layout,), return_type=self.values.type)
        def widen(_: Any, words: Any) -> Any:
            return hopper.pack(to_floats(hopper.unpack(words), 2))

        return cast(Operation, widen)

    def rotate(self, heads: int) -> Operation:
        """``(values, cosines, sines, first unit) -> values``: rotates the pairs (i, i + d / 2)."""

        @plgpu.inline_mgpu(
            arg_types=(self.values.layout, plgpu.RefType(), plgpu.RefType(), self.scalar), return_type=self.values.type
        )
        def rotate(_: Any, values: Any, cosines: Any, sines: Any, first: Any) -> Any:
            token, _head, _exists = self._unit(first, heads)
            registers = hopper.unpack(values)
            low, high = registers[:EACH], registers[EACH:]
            cos = self._load_floats(cosines, token, self.shape.head_dim // 2)
            sin = self._load_floats(sines, token, self.shape.head_dim // 2)
            fma = hopper.multiply_add
            new_low = [fma(a, c, arith.negf(arith.mulf(b, s))) for a, b, c, s in zip(low, high, cos, sin, strict=True)]
            new_high = [fma(b, c, arith.mulf(a, s)) for a, b, c, s in zip(low, high, cos, sin, strict=True)]
            return hopper.pack([*new_low, *new_high])

        return cast(Operation, rotate)

    def combine(self, heads: int, operation: Literal["times", "over", "minus"]) -> Operation:
        """``(values, table [kv heads, d] float32, first unit) -> values``: combined with the row of the kv head."""

        @plgpu.inline_mgpu(arg_types=(self.values.layout, plgpu.RefType(), self.scalar), return_type=self.values.type)
        def combine(_: Any, values: Any, table: Any, first: Any) -> Any:
            _token, head, _exists = self._unit(first, heads)
            kv_head = arith.divui(head, i32(heads // self.shape.kv_heads))
            row = self._load_floats(table, kv_head, self.shape.head_dim)
            if operation == "over":
                row = [hopper.approximate_reciprocal(r) for r in row]
            apply = arith.subf if operation == "minus" else arith.mulf
            return hopper.pack([apply(a, b) for a, b in zip(hopper.unpack(values), row, strict=True)])

        return cast(Operation, combine)

    def mix(self) -> Operation:
        """``values -> values``: times the orthonormal Hadamard matrix of Sylvester's construction."""

        @plgpu.inline_mgpu(arg_types=(self.values.layout,), return_type=self.values.type)
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
            for distance in (2**bit for bit in range(self.shape.lanes.bit_length() - 1)):
                upper = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(self._lane(), i32(distance)), i32(0))
                others = [hopper.exchange(r, distance) for r in registers]
                registers = [
                    arith.select(upper, arith.subf(o, r), arith.addf(r, o))
                    for r, o in zip(registers, others, strict=True)
                ]
            return hopper.pack([arith.mulf(r, f32(1 / math.sqrt(self.shape.head_dim))) for r in registers])

        return cast(Operation, mix)

    def _rounded(self, registers: Sequence[ir.Value], factor: ir.Value) -> list[ir.Value]:
        """A lane's channels of the first and of the second half, times the factor, as words of four e4m3."""
        scaled = [arith.mulf(r, factor) for r in registers]
        return [hopper.to_e4m3x4(scaled[EACH * half : EACH * (half + 1)]) for half in range(2)]

    def _store_row(
        self, x8: Any, row: ir.Value, registers: Sequence[ir.Value], factor: ir.Value, exists: ir.Value
    ) -> None:  # fmt: skip
        """Writes a unit's head, times the factor, to a row of ``head_dim`` e4m3."""
        d = self.shape.head_dim
        at = hopper.global_address(x8, 1, (row, d), (arith.muli(self._lane(), i32(EACH)), 1))
        flag = arith.extui(ir.IntegerType.get_signless(32), exists)
        for half, part in enumerate(self._rounded(registers, factor)):
            store_global("b32", "r", at, part, flag, half * d // 2)

    def store_queries(self) -> Operation:
        """``(values, q8, q_scale, first unit) -> ()``: e4m3 with the scale ``max|x| / 448``, or 1 of zeros.

        The quotients are products with reciprocals, up to their last bits.
        """
        heads = self.shape.heads

        @plgpu.inline_mgpu(
            arg_types=(self.values.layout, plgpu.RefType(), plgpu.RefType(), self.scalar), return_type=()
        )
        def store(_: Any, values: Any, q8: Any, q_scale: Any, first: Any) -> Any:
            word = ir.IntegerType.get_signless(32)
            token, head, exists = self._unit(first, heads)
            registers = hopper.unpack(values)
            peak = self._across(largest_magnitude(registers))
            zero = arith.cmpf(arith.CmpFPredicate.OEQ, peak, f32(0))
            scale = arith.select(zero, f32(1), arith.mulf(peak, f32(1 / E4M3_MAX)))
            factor = hopper.approximate_reciprocal(hopper.maximum(scale, f32(SMALLEST_NORMAL)))
            row = arith.addi(arith.muli(token, i32(heads)), head)
            self._store_row(q8, row, registers, factor, exists)
            flag = arith.extui(word, arith.andi(self._is_first_lane(), exists))
            store_global("f32", "f", hopper.global_address(q_scale, 4, (row, 1)), scale, flag)
            return ()

        return cast(Operation, store)

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
        """A lane's channels of the first and of the second half, times the factor, as four int4 in 16 bits each."""
        word = ir.IntegerType.get_signless(32)
        # Added to ROUNDING a number becomes an integer in the last bits, whose last four are the code's plus 8.
        numbers = [arith.bitcast(word, hopper.multiply_add(r, factor, f32(ROUNDING))) for r in registers]
        lowest = int(np.float32(ROUNDING + INT4_MIN).view(np.int32))
        numbers = [arith.minsi(arith.maxsi(x, i32(lowest)), i32(lowest + 15)) for x in numbers]
        words = []
        for half in (numbers[:EACH], numbers[EACH:]):
            four = half[0]
            for i, number in enumerate(half[1:], start=1):
                four = arith.addi(four, arith.shli(number, i32(4 * i)))  # of what is not the code nothing is below 2^16
            words.append(arith.xori(four, i32(0x8888)))
        return words

    def store_codes(self) -> Operation:
        """``(values, codes, scales, starts, lengths, first unit, peak) -> peak``: int4 like ``quantize_kv``'s.

        They go to their slot, if the cache has it. ``peak`` is the largest magnitude of a thread's units so far.
        """
        s = self.shape

        @plgpu.inline_mgpu(
            arg_types=(self.values.layout, *[plgpu.RefType()] * 4, self.scalar, self.single.layout),
            return_type=self.single.type,
        )
        def store(
            _: Any, values: Any, codes: Any, scales: Any, starts: Any, lengths: Any, first: Any, before: Any
        ) -> Any:
            word, single = ir.IntegerType.get_signless(32), ir.F32Type.get()
            token, head, exists = self._unit(first, s.kv_heads)
            registers = hopper.unpack(values)
            peak, positive = self._signed_peak(registers)
            zero = arith.cmpf(arith.CmpFPredicate.OEQ, peak, f32(0))
            magnitude = arith.select(zero, f32(1), arith.mulf(peak, f32(-1 / INT4_MIN)))
            positive = arith.andi(positive, arith.cmpf(arith.CmpFPredicate.OGT, peak, f32(0)))
            scale = arith.select(positive, arith.subf(f32(0), magnitude), magnitude)
            rounded = hopper.to_bf16x2(scale, f32(0))
            scale = arith.bitcast(single, arith.shli(rounded, i32(16)))
            parts = self._codes(registers, hopper.reciprocal(scale))
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
            flag = arith.extui(word, real)
            at = hopper.global_address(codes, 1, (row, s.head_dim // 2), (self._lane(), EACH // 2))
            for half, part in enumerate(parts):
                store_global("b16", "r", at, part, flag, half * s.head_dim // 4)
            flag = arith.extui(word, arith.andi(self._is_first_lane(), real))
            store_global("b16", "r", hopper.global_address(scales, 2, (row, 1)), rounded, flag)
            return hopper.pack([hopper.maximum_or_nan(peak, hopper.unpack(before)[0])])

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
        """A unit's sequence and head as one number, and its token in the sequence."""
        unit, size = self._number(first), i32(self.blocks * SCALE_TOKENS)
        return arith.divui(unit, size), arith.remui(unit, size)

    def _unit(self, first: Any, heads: int) -> tuple[ir.Value, ir.Value, ir.Value]:
        rest, number = self._position(first)
        exists = arith.cmpi(arith.CmpIPredicate.ult, number, i32(self.shape.tokens))
        number = arith.minui(number, i32(self.shape.tokens - 1))
        token = arith.addi(arith.muli(arith.divui(rest, i32(heads)), i32(self.shape.tokens)), number)
        return token, arith.remui(rest, i32(heads)), exists

    def keep_real(self, of: Container) -> Operation:
        """``(registers, lengths, first unit) -> registers``: zeros behind the real tokens."""

        @plgpu.inline_mgpu(arg_types=(of.layout, plgpu.RefType(), self.scalar), return_type=of.type)
        def keep(_: Any, container: Any, lengths: Any, first: Any) -> Any:
            rest, number = self._position(first)
            sequence = arith.divui(rest, i32(self.shape.kv_heads))
            length = load_word(hopper.global_address(lengths, 4, (sequence, 1)))
            real = arith.andi(
                arith.cmpi(arith.CmpIPredicate.slt, number, length),
                arith.cmpi(arith.CmpIPredicate.ult, number, i32(self.shape.tokens)),
            )
            zero = of.zero()
            return hopper.pack([arith.select(real, r, zero) for r in hopper.unpack(container)])

        return cast(Operation, keep)

    def _held(self, held: Any, of: Container, number: Any) -> list[tuple[ir.Value, int]]:
        """Where a thread has each four of its registers, in the part of that number: an address and an offset."""
        fours = of.registers // 4
        part = arith.muli(number.registers.item(), i32(fours * self.shape.threads))
        place = arith.muli(arith.addi(part, utils.thread_idx()), i32(16))
        base = arith.addi(hopper.shared_address(held), place)
        return [(base, 16 * self.shape.threads * i) for i in range(fours)]

    def hold(self, of: Container) -> Operation:
        """``(registers, held, number) -> ()``: each thread's to its place in a part of shared memory."""
        constraint = "f" if of.dtype == jnp.float32 else "r"

        @plgpu.inline_mgpu(arg_types=(of.layout, plgpu.RefType(), self.scalar), return_type=())
        def hold(_: Any, container: Any, held: Any, number: Any) -> Any:
            registers = hopper.unpack(container)
            for i, (base, offset) in enumerate(self._held(held, of, number)):
                hopper.asm(
                    f"st.shared.v4.b32 [$0+{offset}], {{$1, $2, $3, $4}};", ",".join(["r"] + [constraint] * 4),
                    [base, *registers[4 * i : 4 * i + 4]], [],
                )  # fmt: skip
            return ()

        return cast(Operation, hold)

    def held(self, of: Container) -> Operation:
        """``(held, number) -> registers``: what a thread put there."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), self.scalar), return_type=of.type)
        def read(_: Any, held: Any, number: Any) -> Any:
            words = [word for place in self._held(held, of, number) for word in hopper.load_shared(*place)]
            return hopper.pack([arith.bitcast(of.register_type(), word) for word in words])

        return cast(Operation, read)

    def share_scale(self, largest: float) -> Operation:
        """``(peak, scales, scratch, block) -> factor``: one over the threads' common scale, which is written, too."""

        @plgpu.inline_mgpu(
            arg_types=(self.single.layout, plgpu.RefType(), plgpu.RefType(), self.scalar), return_type=self.single.type
        )
        def share(_: Any, peak: Any, scales: Any, scratch: Any, block: Any) -> Any:
            word = ir.IntegerType.get_signless(32)
            [mine] = hopper.unpack(peak)
            scale = e4m3_scale(across_block(mine, scratch, self.shape.warps, hopper.maximum_or_nan), largest)
            # Up to a power of two; a NaN stays one.
            above = arith.addi(arith.bitcast(word, scale), i32(MANTISSA))
            above = arith.bitcast(ir.F32Type.get(), arith.andi(above, i32(~MANTISSA)))
            scale = arith.select(arith.cmpf(arith.CmpFPredicate.OEQ, scale, scale), above, scale)
            first = arith.cmpi(arith.CmpIPredicate.eq, utils.thread_idx(), i32(0))
            hopper.store_float_if(hopper.global_address(scales, 4, (block.registers.item(), 1)), scale, first)
            return hopper.pack([hopper.reciprocal(scale)])

        return cast(Operation, share)

    def store_keys(self) -> Operation:
        """``(values, factor, k8, first unit) -> ()``."""
        heads = self.shape.kv_heads

        @plgpu.inline_mgpu(
            arg_types=(self.values.layout, self.single.layout, plgpu.RefType(), self.scalar), return_type=()
        )  # fmt: skip
        def store(_: Any, values: Any, factor: Any, k8: Any, first: Any) -> Any:
            token, head, exists = self._unit(first, heads)
            row = arith.addi(arith.muli(token, i32(heads)), head)
            self._store_row(k8, row, hopper.unpack(values), hopper.unpack(factor)[0], exists)
            return ()

        return cast(Operation, store)

    def _swizzle(self, row: ir.Value) -> ir.Value:
        """What the numbers of a row's words are turned by: other banks for the rows that a warp writes at once."""
        return arith.muli(arith.shrui(row, i32(2)), i32(128 // self.shape.head_dim))

    def _tile(self, held: Any) -> ir.Value:
        """Where values are turned: behind a block's values in bf16."""
        return arith.addi(hopper.shared_address(held), i32(2 * self.shape.head_dim * SCALE_TOKENS))

    def hold_values(self) -> Operation:
        """``(values, factor, held, first unit) -> ()``: into shared memory behind what is held, a row per channel.

        Tokens come to the places that :func:`pallas_kernels.reference.transpose_values` gives them. The lanes of a
        token and of the next one exchange halves, so that each writes two tokens at once.
        """
        d, lanes = self.shape.head_dim, self.shape.lanes

        @plgpu.inline_mgpu(
            arg_types=(self.values.layout, self.single.layout, plgpu.RefType(), self.scalar), return_type=()
        )  # fmt: skip
        def hold(_: Any, values: Any, factor: Any, held: Any, first: Any) -> Any:
            _rest, number = self._position(first)
            number = arith.andi(number, i32(SCALE_TOKENS - 1))
            second = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(number, i32(1)), i32(0))
            low_half, high_half = self._rounded(hopper.unpack(values), hopper.unpack(factor)[0])
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
            base = arith.addi(self._tile(held), arith.addi(arith.muli(row, i32(SCALE_TOKENS)), place))
            for i in range(0, EACH, 2):
                selector = 0x5140 + 0x2222 * (i // 2)
                pairs = hopper.permute(even, odd, selector)
                hopper.asm(
                    "{ .reg .b16 l, h; mov.b32 {l, h}, $1; "
                    f"st.shared.b16 [$0+{i * SCALE_TOKENS}], l; st.shared.b16 [$0+{(i + 1) * SCALE_TOKENS}], h; }}",
                    "r,r", [base, pairs], [],
                )  # fmt: skip
            return ()

        return cast(Operation, hold)

    def write_values(self) -> Operation:
        """``(held, v8, block) -> ()``: what all threads put behind it, ``SCALE_TOKENS`` bytes of each channel."""
        d, warps = self.shape.head_dim, self.shape.warps

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), self.scalar), return_type=())
        def write(_: Any, held: Any, v8: Any, block: Any) -> Any:
            word = ir.IntegerType.get_signless(32)
            hopper.block_barrier()
            head, block = arith.divui(block.registers.item(), i32(self.blocks)), block.registers.item()
            number = arith.subi(block, arith.muli(head, i32(self.blocks)))
            lane, warp = arith.andi(utils.thread_idx(), i32(31)), arith.shrui(utils.thread_idx(), i32(5))
            column = arith.addi(arith.muli(number, i32(SCALE_TOKENS)), arith.muli(lane, i32(4)))
            row_bytes = self.blocks * SCALE_TOKENS
            first_row = arith.addi(arith.muli(head, i32(d)), warp)
            target = hopper.global_address(v8, 1, (first_row, row_bytes), (column, 1))
            source = arith.addi(self._tile(held), arith.muli(warp, i32(SCALE_TOKENS)))
            for i in range(d // warps):  # a row for each warp
                row = arith.addi(warp, i32(i * warps))
                place = arith.shli(arith.xori(lane, self._swizzle(row)), i32(2))
                address = arith.addi(source, place)
                [four] = hopper.asm(f"ld.shared.b32 $0, [$1+{i * warps * SCALE_TOKENS}];", "=r,r", [address], [word])
                hopper.asm(f"st.global.b32 [$0+{i * warps * row_bytes}], $1;", "l,r", [target, four], [])
            return ()

        return cast(Operation, write)


def load_word(address: ir.Value) -> ir.Value:
    """A word of global memory."""
    return hopper.asm("ld.global.nc.b32 $0, [$1];", "=r,l", [address], [ir.IntegerType.get_signless(32)])[0]


def load_words(address: ir.Value, count: int) -> list[ir.Value]:
    """Two or four neighbouring words of global memory."""
    listed = ", ".join(f"${i}" for i in range(count))
    ptx = f"ld.global.nc.v{count}.b32 {{{listed}}}, [${count}];"
    return hopper.asm(ptx, ",".join(["=r"] * count + ["l"]), [address], [ir.IntegerType.get_signless(32)] * count)


def store_global(
    kind: str, constraint: str, address: ir.Value, value: ir.Value, flag: ir.Value, offset: int = 0
) -> None:  # fmt: skip
    """Writes a float32, a word, or its lower half behind an address, where the flag is not 0."""
    source, split = ("l", ".reg .b16 l, h; mov.b32 {l, h}, $1; ") if kind == "b16" else ("$1", "")
    hopper.asm(
        f"{{ .reg .pred p; {split}setp.ne.b32 p, $2, 0; @p st.global.{kind} [$0+{offset}], {source}; }}",
        f"l,{constraint},r", [address, value, flag], [],
    )  # fmt: skip
