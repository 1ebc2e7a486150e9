"""The register-level steps of the kernels that make e4m3 activations, :mod:`pallas_kernels.mosaic_rows`."""

import math
from collections.abc import Sequence
from typing import Any, cast

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import arithmetic, hopper
from pallas_kernels.hopper import f32, i32
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.reference import E4M3_MAX
from pallas_kernels.tiling import FLAGS

VECTOR = 8  # bf16 that a thread reads at once
MAX_WARPGROUPS = 8


class Steps:
    """The steps for rows of k elements, one per block or cluster; a thread holds every so manieth vector of a row.

    A row that a cluster of ``parts`` blocks shares may be gated and rounded, but not normalised.
    """

    def __init__(self, k: int, warpgroups: int, parts: int = 1) -> None:
        self.k, self.warps, self.parts = k, 4 * warpgroups, parts
        self.threads = 32 * self.warps
        self.vectors = -(-k // (VECTOR * self.threads * parts))  # of a thread
        scalar = plgpu.Layout.WG_SPLAT(())
        self.scalar = scalar
        count = VECTOR * self.vectors
        self.layout = hopper.container_layout(count)
        self.type = hopper.container_type(count, jnp.float32)

    def _first_column(self) -> ir.Value:
        """The column of a thread's first vector."""
        thread = utils.thread_idx()
        if self.parts > 1:
            thread = arith.addi(thread, arith.muli(hopper.block_in_cluster(), i32(self.threads)))
        return arith.muli(thread, i32(VECTOR))

    def _places(self) -> list[tuple[int, ir.Value | None]]:
        """Of each of a thread's vectors how far behind the first column it is, and whether the row has it, if not all.

        With distances that the compiler knows a row needs one address for all of them.
        """
        first = self._first_column()
        places: list[tuple[int, ir.Value | None]] = []
        for i in range(self.vectors):
            behind = i * self.threads * self.parts * VECTOR
            if behind + self.threads * self.parts * VECTOR <= self.k:
                places.append((behind, None))
            else:
                places.append((behind, arith.cmpi(arith.CmpIPredicate.ult, first, i32(self.k - behind))))
        return places

    def _address(self, ref: Any, row: ir.Value | None, size: int) -> ir.Value:
        """Of a thread's first vector."""
        return hopper.global_address(ref, size, (self._first_column(), 1), (0 if row is None else row, self.k))

    def _read(self, ref: Any, row: ir.Value | None, dtype: Any = jnp.bfloat16) -> list[ir.Value]:
        """A thread's elements of a row of bf16 or float32, zeros behind its end."""
        size, words = jnp.dtype(dtype).itemsize, []
        address = self._address(ref, row, size)
        for behind, exists in self._places():
            for offset in range(0, VECTOR * size, 16):
                words += hopper.load_global(4, address, exists, behind * size + offset)
        return to_floats(words, size)

    def _write(self, ref: Any, row: ir.Value, words: Sequence[ir.Value]) -> None:
        """Writes words of four e4m3, two per vector."""
        address = self._address(ref, row, 1)
        for i, (behind, exists) in enumerate(self._places()):
            hopper.store_global(address, words[2 * i : 2 * i + 2], behind, exists)

    def load(self) -> Operation:
        """``(x, row) -> values``: a row in float32."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), self.scalar), return_type=self.type)
        def read(_: Any, x: Any, row: Any) -> Any:
            return hopper.pack(self._read(x, row.registers.item()))

        return cast(Operation, read)

    def normalize(self, eps: float, gain_dtype: Any) -> Operation:
        """``(values, gain, scratch) -> values``: ``x / sqrt(mean(x²) + eps) · gain``, rounded to bf16."""

        @plgpu.inline_mgpu(arg_types=(self.layout, plgpu.RefType(), plgpu.RefType()), return_type=self.type)
        def normalize(_: Any, values: Any, gain: Any, scratch: Any) -> Any:
            registers, gains = hopper.unpack(values), self._read(gain, None, gain_dtype)
            return hopper.pack(normalized(registers, gains, self.k, eps, scratch, self.warps))

        return cast(Operation, normalize)

    def gate(self) -> Operation:
        """``(values, up, row) -> values``: ``silu(values) · up``, in float32."""

        @plgpu.inline_mgpu(arg_types=(self.layout, plgpu.RefType(), self.scalar), return_type=self.type)
        def gate(_: Any, values: Any, up: Any, row: Any) -> Any:
            return hopper.pack(gated(hopper.unpack(values), self._read(up, row.registers.item())))

        return cast(Operation, gate)

    def quantize(self) -> Operation:
        """``(values, x8, x_scale, scratch, row) -> ()``: writes e4m3 with the scale ``max|x| / 448``, or 1 of zeros."""

        @plgpu.inline_mgpu(
            arg_types=(self.layout, plgpu.RefType(), plgpu.RefType(), plgpu.RefType(), self.scalar), return_type=()
        )
        def quantize(_: Any, values: Any, x8: Any, x_scale: Any, scratch: Any, row: Any) -> Any:
            row = row.registers.item()
            packed, scale = rounded_to_e4m3(hopper.unpack(values), scratch, self.warps, self.parts)
            self._write(x8, row, packed)
            place = hopper.global_address(x_scale, 4, (row, 1))
            first = arith.cmpi(arith.CmpIPredicate.eq, utils.thread_idx(), i32(0))
            hopper.store_global(place, [scale], condition=first)
            return ()

        return cast(Operation, quantize)

    def clear(self) -> Operation:
        """``(flags, row) -> ()``: zeros them, in the first row's block."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), self.scalar), return_type=())
        def clear(_: Any, flags: Any, row: Any) -> Any:
            first = arith.cmpi(arith.CmpIPredicate.eq, row.registers.item(), i32(0))
            for begin in range(0, FLAGS, 4 * self.threads):
                number = arith.addi(arith.muli(utils.thread_idx(), i32(4)), i32(begin))
                exists = arith.andi(first, arith.cmpi(arith.CmpIPredicate.ult, number, i32(FLAGS)))
                hopper.store_global(hopper.global_address(flags, 4, (number, 1)), [i32(0)] * 4, condition=exists)
            return ()

        return cast(Operation, clear)


def normalized(
    registers: Sequence[ir.Value],
    gains: Sequence[ir.Value],
    k: int,
    eps: float,
    scratch: Any,
    warps: int,
    rows: int = 1,
) -> list[ir.Value]:
    """``x / sqrt(mean(x²) + eps) · gain``, rounded to bf16, of a row of k that a block's threads hold, or several."""
    squares = balanced([arith.mulf(r, r) for r in registers], arith.addf)
    total = across_block(squares, scratch, warps, arith.addf, rows)
    mean = arith.addf(arith.mulf(total, f32(1 / k)), f32(eps))
    inverse = hopper.pure_asm("rsqrt.approx.f32 $0, $1;", "=f,f", [mean], mean.type)
    scaled = [arith.mulf(arith.mulf(r, inverse), g) for r, g in zip(registers, gains, strict=True)]
    return [value for w in to_words(scaled) for value in from_bf16x2(w)]


def gated(gates: Sequence[ir.Value], others: Sequence[ir.Value]) -> list[ir.Value]:
    """``silu(gate) · other`` in float32, of an even number of pairs.

    Two neighbours share a reciprocal, which takes as long as a power; so powers are held below the root of the largest
    float32, where the sigmoid is less than any rounding of results. A NaN stays where it is.
    """
    results, steepness, largest = [], f32(-1 / math.log(2)), f32(60)
    for i in range(0, len(gates), 2):
        powers = []
        for gate in gates[i : i + 2]:
            exponent = arith.minnumf(arith.mulf(gate, steepness), largest)
            powers.append(arith.addf(arithmetic.exp2(exponent), f32(1)))
        inverse = arithmetic.approximate_reciprocal(arith.mulf(*powers))
        for gate, other, power in zip(gates[i : i + 2], others[i : i + 2], reversed(powers), strict=True):
            results.append(arith.mulf(arith.mulf(gate, arith.mulf(inverse, power)), other))
    return results


def rounded_to_e4m3(
    registers: Sequence[ir.Value], scratch: Any, warps: int, parts: int = 1, rows: int = 1
) -> tuple[list[ir.Value], ir.Value]:
    """Words of four e4m3 and their scale, for a row that the threads of a block, or of a cluster's blocks, hold.

    Or for the row of several that a thread has a part of. ``scratch`` has a word of shared memory per warp and, in a
    cluster, one more per block.
    """
    peak = across_block(largest_magnitude(registers), scratch, warps, arithmetic.maximum_or_nan, rows)
    if parts > 1:
        peak = across_cluster(peak, scratch, 4 * warps, parts, arithmetic.maximum_or_nan)
    scale = e4m3_scale(peak)
    quotients = arithmetic.divide_all(registers, scale)
    packed = [arithmetic.to_e4m3x4(quotients[i : i + 4]) for i in range(0, len(quotients), 4)]
    return packed, scale


def from_bf16x2(word: ir.Value) -> list[ir.Value]:
    """Two bf16 as float32."""
    single = ir.F32Type.get()
    low, high = arith.shli(word, i32(16)), arith.andi(word, i32(0xFFFF0000))
    return [arith.bitcast(single, low), arith.bitcast(single, high)]


def to_floats(words: Sequence[ir.Value], size: int) -> list[ir.Value]:
    """Words of bf16 or, if ``size`` is 4, of float32 as float32."""
    if size == 4:
        return [arith.bitcast(ir.F32Type.get(), w) for w in words]
    return [value for w in words for value in from_bf16x2(w)]


def to_words(values: Sequence[ir.Value]) -> list[ir.Value]:
    """float32 to packed bf16."""
    return [arithmetic.to_bf16x2(values[i], values[i + 1]) for i in range(0, len(values), 2)]


def largest_magnitude(registers: Sequence[ir.Value]) -> ir.Value:
    """Of a thread's float32 registers, or NaN if one is."""
    return balanced([arithmetic.magnitude(r) for r in registers], arithmetic.maximum_or_nan)


def e4m3_scale(peak: ir.Value, largest: float = E4M3_MAX) -> ir.Value:
    """``peak / largest``, or 1 if that is 0."""
    scale = arithmetic.divide(peak, f32(largest))
    return arith.select(arith.cmpf(arith.CmpFPredicate.OEQ, peak, f32(0)), f32(1), scale)


def across_block(value: ir.Value, scratch: Any, warps: int, combine: Any, rows: int = 1) -> ir.Value:
    """Combines a float32 of every thread of a block, or of as many neighbouring warps as have a row's.

    ``scratch``, a word of shared memory per warp, is used once.
    """
    value = hopper.across_lanes(value, combine)
    thread = utils.thread_idx()
    base = hopper.shared_address(scratch)
    first = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(thread, i32(31)), i32(0))
    own = arith.addi(base, arith.muli(arith.shrui(thread, i32(5)), i32(4)))
    hopper.store_shared(own, [value], condition=first)
    hopper.block_barrier()
    each = warps // rows
    if rows > 1:
        base = arith.addi(base, arith.muli(arith.divui(thread, i32(32 * each)), i32(4 * each)))
    values = [hopper.asm(f"ld.shared.f32 $0, [$1+{4 * w}];", "=f,r", [base], [value.type])[0] for w in range(each)]
    return balanced(values, combine)


def across_cluster(value: ir.Value, scratch: Any, offset: int, parts: int, combine: Any) -> ir.Value:
    """Combines a float32 of every block of a cluster, whose blocks have all arrived at its barrier when they began.

    Behind so many bytes of ``scratch`` there is a word of shared memory per block, which is used once.
    """
    thread, word = utils.thread_idx(), ir.IntegerType.get_signless(32)
    mine = arith.addi(hopper.shared_address(scratch), i32(offset))
    place = arith.addi(mine, arith.muli(hopper.block_in_cluster(), i32(4)))
    sends = arith.extui(word, arith.cmpi(arith.CmpIPredicate.ult, thread, i32(parts)))
    hopper.asm("barrier.cluster.wait.acquire;", "", [], [])
    hopper.asm(  # a thread tells a block
        "{ .reg .pred p; .reg .b32 a; setp.ne.b32 p, $3, 0; @p mapa.shared::cluster.u32 a, $0, $1; "
        "@p st.shared::cluster.f32 [a], $2; }", "r,r,f,r", [place, thread, value, sends], [],
    )  # fmt: skip
    hopper.asm("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;", "", [], [])
    values = [hopper.asm(f"ld.shared.f32 $0, [$1+{4 * i}];", "=f,r", [mine], [value.type])[0] for i in range(parts)]
    return balanced(values, combine)


def balanced(values: Sequence[ir.Value], combine: Any) -> ir.Value:
    """Combines values pairwise, for short chains and small errors."""
    values = list(values)
    while len(values) > 1:
        values = [combine(*values[i : i + 2]) if i + 1 < len(values) else values[i] for i in range(0, len(values), 2)]
    return values[0]
