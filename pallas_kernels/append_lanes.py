"""How the lanes of a warp hold heads of a token, and how these are mixed; for :mod:`pallas_kernels.append_steps`."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import override

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import arithmetic, hopper, tensor_core
from pallas_kernels.hopper import f32, i32

EACH = 4  # neighbouring channels of each of two groups that a lane holds of a unit
BF16_ONES = 0x3F803F80  # two of them
BF16_SIGNS = 0x80008000  # and their signs


class Lanes:
    """A unit, a head of a token, in ``head_dim / 8`` lanes.

    Attributes:
      distances: powers of two by which numbers of lanes of one unit differ. The first ones count what is spread.
      apart: channels between the beginnings of a lane's two groups.
    """

    def __init__(self, head_dim: int, distances: tuple[int, ...], apart: int) -> None:
        self.head_dim, self.distances, self.apart = head_dim, distances, apart
        self.thread: Callable[[], ir.Value] = utils.thread_idx

    def anew(self) -> "Lanes":
        """The same, but with what depends on the thread's number computed again, not kept in registers till then."""
        same, number = copy.copy(self), hopper.thread_anew()
        same.thread = lambda: number
        return same

    def column(self) -> ir.Value:
        """A lane's first channel."""
        raise NotImplementedError

    def unit(self) -> ir.Value:
        """The number of a lane's unit in its block."""
        raise NotImplementedError

    def spread(
        self, values: Iterator[ir.Value], count: int, combine: Callable[[ir.Value, ir.Value], ir.Value]
    ) -> ir.Value:
        """Combines the next 1, 2 or 4 registers over a unit's lanes, each of which gets the result of one.

        That takes half of the exchanges or less, since lanes that have one result's part need none of another's. A
        value is asked for when those before it have been combined.
        """

        def among(count: int) -> ir.Value:
            if count == 1:
                return next(values)
            first, second = among(count // 2), among(count // 2)
            distance = self.distances[count.bit_length() - 2]
            upper = _has_bit(hopper.thread_anew(), distance)
            received = hopper.exchange(arith.select(upper, first, second), distance)
            return combine(arith.select(upper, second, first), received)

        result = among(count)
        for distance in self.distances[count.bit_length() - 1 :]:
            result = combine(result, hopper.exchange(result, distance))
        return result

    def number(self, count: int) -> ir.Value:
        """Which of ``count`` results :meth:`spread` gives a lane."""
        number = i32(0)
        for i, distance in enumerate(self.distances[: count.bit_length() - 1]):
            bit = arith.andi(self.thread(), i32(distance))
            down = distance.bit_length() - 1 - i
            number = arith.ori(number, arith.shrui(bit, i32(down)) if down >= 0 else arith.shli(bit, i32(-down)))
        return number

    def is_first(self, count: int) -> ir.Value:
        """Whether a lane is the one, of a unit's, that writes its result of :meth:`spread`."""
        others = sum(self.distances[count.bit_length() - 1 :])
        return arith.cmpi(arith.CmpIPredicate.eq, arith.andi(self.thread(), i32(others)), i32(0))

    def of_number(self, register: ir.Value, number: int, count: int) -> ir.Value:
        """The register of the lane to which :meth:`spread` gave the result of that number."""
        if count == 1:
            return register
        used = self.distances[: count.bit_length() - 1]
        if used[-1] == count // 2:  # neighbours
            return hopper.of_neighbour(register, number, count)
        places = sum(distance for i, distance in enumerate(used) if number >> i & 1)
        own = arith.andi(self.thread(), i32(31 - sum(used)))
        return hopper.shuffle(register, arith.ori(own, i32(places)))


class Halves(Lanes):
    """Units of neighbouring lanes, each of which has four channels of the head's first half, and those half a head on.

    So it has both channels of every pair that is rotated. ``turned`` is the order of lanes that :func:`mix` takes.
    """

    def __init__(self, head_dim: int, turned: bool = False) -> None:
        self.lanes, self.turned = head_dim // (2 * EACH), turned
        super().__init__(head_dim, tuple(2**i for i in range(self.lanes.bit_length() - 1)), head_dim // 2)

    @override
    def column(self) -> ir.Value:
        lane = arith.andi(self.thread(), i32(self.lanes - 1))
        if self.turned:  # bits 2, 0, 1 and 3
            lowest = arith.andi(arith.shrui(lane, i32(2)), i32(1))
            pair, last = arith.shli(arith.andi(lane, i32(3)), i32(1)), arith.andi(lane, i32(8))
            lane = arith.ori(arith.ori(lowest, pair), last)
        return arith.muli(lane, i32(EACH))

    @override
    def unit(self) -> ir.Value:
        return arith.divui(self.thread(), i32(self.lanes))


class Mixed(Lanes):
    """Where :func:`mix` leaves units of ``Halves(head_dim, turned=True)``: eight neighbouring channels in a lane."""

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim, (4, 8, 16) if head_dim == 64 else (1, 4, 8, 16), EACH)

    @override
    def column(self) -> ir.Value:
        thread = self.thread()
        # Bits 3 and 4 count channels in eights, bit 2 halves of the head.
        column = arith.andi(thread, i32(24))
        column = arith.ori(column, arith.muli(arith.andi(thread, i32(4)), i32(self.head_dim // 8)))
        if self.head_dim == 128:
            column = arith.ori(column, arith.muli(arith.andi(thread, i32(1)), i32(32)))
        return column

    @override
    def unit(self) -> ir.Value:
        thread = self.thread()
        warp, units = arith.shrui(thread, i32(5)), 256 // self.head_dim
        among = arith.andi(thread, i32(3)) if units == 4 else arith.andi(arith.shrui(thread, i32(1)), i32(1))
        return arith.addi(arith.muli(warp, i32(units)), among)


def mix(registers: Sequence[ir.Value], head_dim: int, thread: Callable[[], ir.Value]) -> list[ir.Value]:
    """Times Sylvester's matrix of ones and minus ones: a warp's units, from ``Halves(turned=True)`` to ``Mixed``.

    The tensor core adds up over four bits of a channel's number: the half, bit 0, and the two that the lane's last bits
    count. Inputs are two bf16, the second one what the first leaves out, so that 16 bits of each count. Its results
    lie so that one more bit of the lane's number is one of the register's now, and sums over the others are taken here.

    Args:
      registers: a lane's eight channels, float32.
      head_dim: 64 or 128.
      thread: gives the thread's number for the last sums. With ``hopper.thread_anew`` no register is held for them.

    Returns:
      Eight others. They are ``sqrt(head_dim)`` times those of an orthonormal matrix.
    """
    word, lane = ir.IntegerType.get_signless(32), arith.andi(utils.thread_idx(), i32(31))
    # The matrix of the tensor core: a minus where the numbers of row and column have an odd number of ones in common.
    # A lane has row lane / 4, and eight behind it, of columns 2 (lane % 4), one behind it, and eight behind them.
    common = arith.andi(arith.shrui(lane, i32(3)), lane)
    odd = arith.andi(arith.xori(common, arith.shrui(common, i32(1))), i32(1))
    signs = arith.muli(odd, i32(BF16_SIGNS))
    signs = arith.xori(signs, arith.shli(arith.andi(arith.shrui(lane, i32(2)), i32(1)), i32(31)))
    ones = arith.xori(signs, i32(BF16_ONES))
    # Three are the same, which ptxas must not know: it would make the four anew, next to each other, for each product.
    matrix = [arith.xori(ones, hopper.unknown_zero(axis)) for axis in ("y", "z")]
    matrix += [ones, arith.xori(ones, i32(BF16_SIGNS))]

    def split(low: ir.Value, high: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The first 16 bits of two float32, and what they leave out."""
        bits = [arith.bitcast(word, x) for x in (low, high)]
        tops = [arith.bitcast(ir.F32Type.get(), arith.andi(x, i32(0xFFFF0000))) for x in bits]
        rest = [arith.subf(x, top) for x, top in zip((low, high), tops, strict=True)]
        return arithmetic.permute(bits[0], bits[1], 0x7632), arithmetic.to_bf16x2(*rest)

    sums = []
    for i in (0, 2):  # bit 1 of a channel's number
        parts = [split(registers[j], registers[EACH + j]) for j in (i, i + 1)]
        four: Sequence[ir.Value] = [f32(0)] * 4
        for several in zip(*parts, strict=True):
            four = tensor_core.multiply_tiles(four, matrix, several, "bf16")
        sums.append(four)
    # Of a product's four registers the first bit of the number counts bit 2 of a channel's, the second one bit 0.
    first, second = ([combine(a, b) for a, b in zip(*sums, strict=True)] for combine in (arith.addf, arith.subf))
    mixed = [combine(x[i], x[i + 1]) for combine in (arith.addf, arith.subf) for x in (first, second) for i in (0, 2)]
    if head_dim == 64:
        return mixed
    sign = arith.select(_has_bit(thread(), 1), f32(-1), f32(1))
    return [arithmetic.multiply_add(r, sign, hopper.exchange(r, 1)) for r in mixed]


def norm_of_mixed(head_dim: int) -> float:
    """By which results of :func:`mix` are those of an orthonormal matrix."""
    return 1 / math.sqrt(head_dim)


def _has_bit(number: ir.Value, bit: int) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.ne, arith.andi(number, i32(bit)), i32(0))
