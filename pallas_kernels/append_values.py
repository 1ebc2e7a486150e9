"""Arithmetic on a lane's channels of a head of a token, for :mod:`pallas_kernels.append_steps`."""

import functools
from collections.abc import Callable, Sequence

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import arithmetic, hopper
from pallas_kernels.append_lanes import EACH
from pallas_kernels.hopper import i32
from pallas_kernels.row_steps import from_bf16x2


class InTurn:
    """Turns bf16 into float32 by instructions that need an earlier result.

    Left to itself ptxas begins with a token's or a head's channels as soon as they are there, however many registers
    those of the ones before still take.
    """

    def __init__(self) -> None:
        self.zero = hopper.unknown_zero()
        self.upper, self.shift = i32(0xFFFF0000), i32(1 << 16)

    def comes_first(self, result: ir.Value) -> None:
        """Has what follows wait for a register."""
        bits = arith.bitcast(ir.IntegerType.get_signless(32), result)
        self.upper, self.shift = (arithmetic.and_or(bits, self.zero, i32(x)) for x in (0xFFFF0000, 1 << 16))

    def to_floats(self, words: Sequence[ir.Value]) -> list[ir.Value]:
        """Of words of two bf16."""
        both = [part for w in words for part in (arith.muli(w, self.shift), arith.andi(w, self.upper))]
        return [arith.bitcast(ir.F32Type.get(), part) for part in both]


def signed_peak(registers: Sequence[ir.Value]) -> ir.Value:
    """The largest magnitude among float32 registers, as a word that is the larger, the larger it is; or NaN's.

    It is the float32 with its sign behind its last bit. Of equal magnitudes a negative one's is larger.
    """
    words = [arith.bitcast(ir.IntegerType.get_signless(32), r) for r in registers]
    return _sign_behind(by_threes(words, arith.maxsi), by_threes(words, arith.maxui))


def signed_peak_of_bf16(words: Sequence[ir.Value]) -> ir.Value:
    """:func:`signed_peak` of words of two bf16."""
    word, largest = ir.IntegerType.get_signless(32), []
    for instruction, combine in (("max.s16x2", arith.maxsi), ("max.u16x2", arith.maxui)):
        pair = by_threes(words, functools.partial(arithmetic.of_pairs, instruction))
        largest.append(combine(*(arith.bitcast(word, x) for x in from_bf16x2(pair))))
    return _sign_behind(*largest)


def _sign_behind(signed: ir.Value, unsigned: ir.Value) -> ir.Value:
    """The signed peak of float32 whose bits are largest as signed numbers and as unsigned ones.

    The first is the largest positive one, the second the negative one of largest magnitude. Where there are none of
    one kind it is a smaller one of the other kind, or the same.
    """
    turned = [
        hopper.pure_asm("shf.l.wrap.b32 $0, $1, $1, 1;", "=r,r", [bits], bits.type) for bits in (signed, unsigned)
    ]
    return arith.maxui(*turned)


def by_threes(values: Sequence[ir.Value], combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
    """The largest of some integers, in the order in which an instruction takes three of them."""
    values = list(values)
    while len(values) > 1:
        values = [functools.reduce(combine, values[i : i + 3]) for i in range(0, len(values), 3)]
    return values[0]


def times(values: Sequence[ir.Value], factors: Sequence[ir.Value]) -> list[ir.Value]:
    """Products of float32."""
    return [arith.mulf(a, b) for a, b in zip(values, factors, strict=True)]


def rounded(registers: Sequence[ir.Value], factor: ir.Value) -> list[ir.Value]:
    """A lane's channels of the first and of the second group, times the factor, as words of four e4m3."""
    scaled = [arith.mulf(r, factor) for r in registers]
    return [arithmetic.to_e4m3x4(scaled[i : i + EACH]) for i in range(0, len(scaled), EACH)]
