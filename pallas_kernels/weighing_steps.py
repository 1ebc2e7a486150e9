"""How scores become weights in a thread's registers, for :mod:`pallas_kernels.prefill_steps`.

A weight is two to the power of its score times the row's factor, plus the row's offset; in float16, with the factors,
or the offsets, of a thread's two rows in one register.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import arithmetic, hopper
from pallas_kernels.hopper import f32, i32
from pallas_kernels.row_steps import balanced

# exp(score - max) is multiplied by 256 before it is rounded to e4m3, which the sum of the weights is as well.
WEIGHT_EXPONENT = 8.0
# A maximum may lag behind by as much, of powers of two: 2^(8 + 0.8) is not more than the largest e4m3.
SLACK = 0.8
# Of float16, twice each: what scores' factors are held between, 2^-23 and 20, and the bits that are 0 in both. Products
# with infinity must be no NaN, the largest score's offset must be finite. A factor of 20 goes with scores of thousands
# of powers of two, of which the largest wins either way.
SMALLEST_FACTORS, LARGEST_FACTORS, SIGNS = 0x00020002, 0x4D004D00, 0x80008000
GROUP = 4  # registers of scores that are weighed together


class Weighing(NamedTuple):
    """How groups of scores become weights.

    Attributes:
      under_way: how many groups are: each begins behind the end of the one as many before it.
      by_polynomial: of a group's powers those found by a polynomial, as the unit for the others would be waited for.
        Groups take turns.
    """

    under_way: int
    by_polynomial: tuple[tuple[int, ...], ...]


# By head size, as measured.
WEIGHING = {64: Weighing(2, ((3,), (2, 3))), 128: Weighing(3, ((1, 2),))}


def held_factors(factors: Iterable[ir.Value]) -> ir.Value:
    """Factors of both rows, float32, as two float16 in the range that they are held in."""
    pair = arithmetic.f16x2("max", arithmetic.to_f16x2(*factors), i32(SMALLEST_FACTORS))
    return arithmetic.f16x2("min", pair, i32(LARGEST_FACTORS))


def new_offsets(scores: Sequence[ir.Value], factors: ir.Value, old: Sequence[ir.Value]) -> ir.Value:
    """Offsets of both rows: the old ones where no score is further above the maximum than ``SLACK``."""
    larger = functools.partial(arithmetic.f16x2, "max")
    # The hardware compares three at once.
    threes = [[functools.reduce(larger, row[i : i + 3]) for i in range(0, len(row), 3)]
              for row in (scores[::2], scores[1::2])]  # fmt: skip
    first, second = (balanced(row, larger) for row in threes)  # a row's even columns, and its odd ones
    largest = larger(arithmetic.permute(first, second, 0x5410), arithmetic.permute(first, second, 0x7632))
    largest = hopper.across_lanes(largest, larger, 4)
    new = []
    for offset, score, factor in zip(old, arithmetic.of_f16x2(largest), arithmetic.of_f16x2(factors), strict=True):
        peak = arith.mulf(score, factor)
        above = arith.cmpf(arith.CmpFPredicate.OGT, arith.addf(peak, offset), f32(WEIGHT_EXPONENT + SLACK))
        # Less by what rounding to float16 may add, lest a weight of a large score be too large for e4m3.
        size = arithmetic.magnitude(peak)
        following = arith.subf(f32(WEIGHT_EXPONENT), peak)
        following = arithmetic.multiply_add(size, f32(-(2.0**-11)), following)
        new.append(arith.select(above, following, offset))
    return arithmetic.to_f16x2(*new)


def to_weights(
    scores: Sequence[ir.Value], factors: ir.Value, offsets: ir.Value, how: Weighing
) -> tuple[list[ir.Value], list[ir.Value]]:
    """Weights in e4m3, and the float32 sums of both rows' columns.

    ptxas would compute all powers first and do everything else behind them, which makes the warp wait for one unit
    after the other. So a group depends, by zeros that ptxas does not know of, on the end of an earlier one.
    """
    by_row = [[arithmetic.permute(x, x, selector) for x in (factors, offsets)] for selector in (0x1010, 0x3232)]
    zeros = arith.andi(factors, i32(SIGNS))
    words: list[ir.Value] = []
    parts: list[list[ir.Value]] = [[], []]
    under_way, by_polynomial = how
    for first in range(0, len(scores), GROUP):
        polynomials, powers = by_polynomial[first // GROUP % len(by_polynomial)], []
        for i, score in enumerate(scores[first : first + GROUP]):
            factor, offset = by_row[i % 2]
            ended = (first - under_way * GROUP) // 2
            if ended >= 0:
                offset = arithmetic.and_or(words[ended + i % 2], zeros, offset)
            exponent = arithmetic.f16x2("fma.rn", score, factor, offset)
            power_of = arithmetic.exp2_f16x2_by_polynomial if i in polynomials else arithmetic.exp2_f16x2
            powers.append(power_of(exponent))
        for half, part in enumerate(parts):
            for j, power in enumerate(powers[half::2]):
                if len(part) == 2:  # chains
                    part[j] = arithmetic.f16x2("add.rn", power, part[j])
                else:
                    part.append(power)
        words += [arithmetic.halves_to_e4m3x4(*powers[i : i + 2]) for i in range(0, GROUP, 2)]
    sums = [arith.addf(*arithmetic.of_f16x2(arithmetic.f16x2("add.rn", *part))) for part in parts]
    return words, sums
