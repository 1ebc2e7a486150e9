"""Arithmetic of single instructions, or a few, on registers: rounding, pairs of float16, quotients, bytes.

What the dialect ``arith`` has no operation for, or would do otherwise; like :mod:`pallas_kernels.hopper`, for steps.
"""

from collections.abc import Sequence

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import hopper
from pallas_kernels.hopper import f32


def to_bf16x2(low: ir.Value, high: ir.Value) -> ir.Value:
    """Rounds two float32 to a register of two bf16."""
    word = ir.IntegerType.get_signless(32)
    return hopper.pure_asm("cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", [high, low], word)


def to_f16x2(low: ir.Value, high: ir.Value) -> ir.Value:
    """Rounds two float32 to a register of two float16."""
    word = ir.IntegerType.get_signless(32)
    return hopper.pure_asm("cvt.rn.f16x2.f32 $0, $1, $2;", "=r,f,f", [high, low], word)


def of_f16x2(pair: ir.Value) -> list[ir.Value]:
    """Two float16, as float32."""
    single = ir.F32Type.get()
    return [
        hopper.pure_asm(f"{{ .reg .b16 l, h; mov.b32 {{l, h}}, $1; cvt.f32.f16 $0, {part}; }}", "=f,r", [pair], single)
        for part in "lh"
    ]


def of_pairs(instruction: str, *operands: ir.Value) -> ir.Value:
    """An instruction on registers of two 16-bit numbers, such as ``max.s16x2``."""
    listed, constraints = ", ".join(f"${i}" for i in range(len(operands) + 1)), ",".join(["=r"] + ["r"] * len(operands))
    return hopper.pure_asm(f"{instruction} {listed};", constraints, operands, operands[0].type)


def f16x2(operation: str, *operands: ir.Value) -> ir.Value:
    """An instruction on registers of two float16, such as ``fma.rn`` or ``max``."""
    return of_pairs(f"{operation}.f16x2", *operands)


def exp2_f16x2(pair: ir.Value) -> ir.Value:
    """Two to the power of two float16.

    The hardware takes one at a time. Results are put together by hand, since those of ``ex2.approx.f16x2`` are put
    together again for each use.
    """
    ptx = (
        "{ .reg .b16 l, h; .reg .b32 a, b; mov.b32 {l, h}, $1; ex2.approx.f16 l, l; ex2.approx.f16 h, h; "
        "cvt.u32.u16 a, l; cvt.u32.u16 b, h; prmt.b32 $0, a, b, 0x5410; }"
    )
    return hopper.pure_asm(ptx, "=r,r", [pair], pair.type)


def exp2_f16x2_by_polynomial(pair: ir.Value) -> ir.Value:
    """As :func:`exp2_f16x2` of numbers up to 15, up to 2.4e-3 of each, by instructions that take two at a time.

    Below -11 it is two to the power of -11. Numbers are split into integers, by adding 1.5 · 2^10 in float16, and
    fractions of up to a half, of which a polynomial of degree 2 is the power (least relative error of those that are 1
    at 0); the integers are added to its exponents. What a negative one of the lower half carries into the upper one is
    its last bit.
    """
    degrees = [0x3C003C00, 0x39A039A0, 0x33B033B0]  # 1, 0.7031 and 0.2402, twice each
    ptx = (
        "{ .reg .b32 x, t, n, f, p, k; mov.b32 k, 0xC980C980; max.f16x2 x, $1, k; "
        "mov.b32 k, 0x66006600; add.rn.f16x2 t, x, k; mov.b32 k, 0xE600E600; add.rn.f16x2 n, t, k; "
        f"sub.rn.f16x2 f, x, n; mov.b32 k, {degrees[2]:#x}; mov.b32 p, {degrees[1]:#x}; fma.rn.f16x2 p, f, k, p; "
        f"mov.b32 k, {degrees[0]:#x}; fma.rn.f16x2 p, p, f, k; "
        "and.b32 t, t, 0x003F003F; mad.lo.u32 $0, t, 1024, p; }"
    )
    return hopper.pure_asm(ptx, "=r,r", [pair], pair.type)


def permute(a: ir.Value, b: ir.Value, selector: int) -> ir.Value:
    """Four of the eight bytes of two registers, each chosen by four bits."""
    return hopper.pure_asm(f"prmt.b32 $0, $1, $2, {selector:#x};", "=r,r,r", [a, b], a.type)


def and_or(a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """``a & b | c``, in one instruction."""
    return hopper.pure_asm("lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [a, b, c], a.type)


def either_and(a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """``(a | b) & c``, in one instruction."""
    return hopper.pure_asm("lop3.b32 $0, $1, $2, $3, 0xA8;", "=r,r,r,r", [a, b, c], a.type)


def halves_to_e4m3x4(low: ir.Value, high: ir.Value) -> ir.Value:
    """Rounds two registers of two float16 to one of e4m3."""
    ptx = (
        "{ .reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f16x2 l, $1; cvt.rn.satfinite.e4m3x2.f16x2 h, $2; "
        "mov.b32 $0, {l, h}; }"
    )
    return hopper.pure_asm(ptx, "=r,r,r", [low, high], low.type)


def to_e4m3x4(four: Sequence[ir.Value]) -> ir.Value:
    """Rounds four float32 to a register of e4m3, the first in the lowest byte."""
    ptx = (
        "{ .reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; cvt.rn.satfinite.e4m3x2.f32 h, $4, $3; "
        "mov.b32 $0, {l, h}; }"
    )
    return hopper.pure_asm(ptx, "=r,f,f,f,f", four, ir.IntegerType.get_signless(32))


def to_halves(word: ir.Value) -> list[ir.Value]:
    """The lower and the upper two of four e4m3 as float16."""
    convert = "{{ .reg .b16 l, h; mov.b32 {{l, h}}, $1; cvt.rn.f16x2.e4m3x2 $0, {}; }}"
    return [hopper.pure_asm(convert.format(part), "=r,r", [word], word.type) for part in "lh"]


def maximum(a: ir.Value, b: ir.Value) -> ir.Value:
    """The larger float32; of a number and a NaN the number."""
    return hopper.pure_asm("max.f32 $0, $1, $2;", "=f,f,f", [a, b], a.type)


def maximum_or_nan(a: ir.Value, b: ir.Value) -> ir.Value:
    """The larger float32, or NaN if one of them is."""
    return hopper.pure_asm("max.NaN.f32 $0, $1, $2;", "=f,f,f", [a, b], a.type)


def magnitude(value: ir.Value) -> ir.Value:
    """A float32 without its sign."""
    return hopper.pure_asm("abs.f32 $0, $1;", "=f,f", [value], value.type)


def divide(a: ir.Value, b: ir.Value) -> ir.Value:
    """The quotient, correctly rounded."""
    return hopper.pure_asm("div.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], a.type)


def divide_all(values: Sequence[ir.Value], divisor: ir.Value) -> list[ir.Value]:
    """Float32 quotients of one divisor, correctly rounded (but all NaN where it is infinite), with one reciprocal.

    The remainder of a quotient's first approximation corrects it (Markstein, IBM J. Res. Dev. 34, 1990).
    """
    size = magnitude(divisor)
    # A small divisor's reciprocal would overflow.
    small = arith.cmpf(arith.CmpFPredicate.OGT, f32(2.0**-32), size)
    enlarge = arith.select(small, f32(2.0**100), f32(1))
    divisor = arith.mulf(divisor, enlarge)
    negative, inverse = _refined_reciprocal(divisor)
    quotients = []
    for value in values:
        value = arith.mulf(value, enlarge)
        first = arith.mulf(value, inverse)
        quotients.append(multiply_add(multiply_add(negative, first, value), inverse, first))
    return quotients


def _refined_reciprocal(divisor: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Minus the divisor, and its reciprocal up to the last bit, by a step of Newton's from the hardware's."""
    negative = arith.subf(f32(0), divisor)
    first = approximate_reciprocal(divisor)
    error = multiply_add(negative, first, f32(1))
    return negative, multiply_add(first, error, first)


def reciprocal(divisor: ir.Value) -> ir.Value:
    """1 over a float32 of magnitude up to 2^126, correctly rounded but for rare last bits.

    Of smaller ones than 2^-126 it is that of 2^-126, which is finite.
    """
    _, result = _refined_reciprocal(maximum(magnitude(divisor), f32(2.0**-126)))
    negative = arith.cmpf(arith.CmpFPredicate.OGT, f32(0), divisor)
    return arith.select(negative, arith.subf(f32(0), result), result)


def approximate_reciprocal(divisor: ir.Value) -> ir.Value:
    """1 over a float32 up to its last bits, exact of a power of two."""
    return hopper.pure_asm("rcp.approx.ftz.f32 $0, $1;", "=f,f", [divisor], divisor.type)


def multiply_add(a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """The product of a and b, plus c, rounded once."""
    return hopper.pure_asm("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, b, c], a.type)


def exp2(value: ir.Value) -> ir.Value:
    """Two to the power of a float32."""
    return hopper.pure_asm("ex2.approx.ftz.f32 $0, $1;", "=f,f", [value], value.type)
