"""The register-level steps of decode attention, which :mod:`pallas_kernels.mosaic_decode` puts in order."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import arithmetic, hopper, tensor_core
from pallas_kernels.hopper import f32, i32
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.tiling import DECODE_SLOTS, DECODE_TILE, MULTIPROCESSOR_SHARED_MEMORY, DecodeCut
from pallas_kernels.warp_slots import WarpSlots

ROWS = 8  # query rows that a tensor core's product takes together
LOG2_E = math.log2(math.e)
# A hidden slot's score, and what a row's maximum begins with: so far apart that no hidden slot weighs anything, and
# finite, so that differences are no NaN.
MASKED, LOWEST = -3e38, -1e25
CODE_UNIT = 2.0**-24  # what a code of 1 is worth when its bits are those of a subnormal float16


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """Static sizes.

    Attributes:
      batch: sequences.
      tokens: new tokens per sequence.
      heads: query heads.
      kv_heads: key/value heads.
      head_dim: 64 or 128.
      slots: of the cache, a multiple of 8.
      cut: how they are cut into pieces.
    """

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    cut: DecodeCut

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Query rows of a kv head."""
        return self.tokens * self.group

    @property
    def row_blocks(self) -> int:
        """Products that take the rows, 1 or 2."""
        return -(-self.rows // ROWS)

    @property
    def pitch(self) -> int:
        """Of results that are to be merged: outputs that were not divided, a row's maximum and its sum, and a gap."""
        return self.head_dim + 4

    @property
    def tile_bytes(self) -> int:
        """Codes of a tile's keys, of its values, and their scales."""
        return DECODE_TILE * (self.head_dim + 4)

    @property
    def shared_words(self) -> int:
        """Of tiles, and later of the warps' results in their place; or as many as leave no place for more blocks."""
        of_warp = max(self.cut.depth * self.tile_bytes // 4, self.row_blocks * ROWS * self.pitch)
        return max(self.cut.warps * of_warp, MULTIPROCESSOR_SHARED_MEMORY // 4 // (self.cut.resident + 1))


def integer(bits: int) -> Any:
    """The type of integers of that size."""
    return ir.IntegerType.get_signless(bits)


def lane_parts() -> tuple[ir.Value, ir.Value, ir.Value]:
    """The lane's g (0 to 7) and t (0 to 3), and its warp."""
    thread = utils.thread_idx()
    lane = arith.andi(thread, i32(31))
    return arith.shrui(lane, i32(2)), arith.andi(lane, i32(3)), arith.shrui(thread, i32(5))


def _lop(ptx_table: int, *operands: ir.Value) -> ir.Value:
    return hopper.pure_asm(f"lop3.b32 $0, $1, $2, $3, {ptx_table};", "=r,r,r,r", list(operands), operands[0].type)


def codes_to_halves(word: ir.Value) -> list[ir.Value]:
    """8 two's complement codes as four float16 pairs: elements (0, 4), (1, 5), (2, 6), (3, 7).

    They are the codes plus 8, times ``CODE_UNIT`` in the first and third pair and times ``16 CODE_UNIT`` in the others.
    """
    pairs = []
    for shift in (0, 8):
        source = arith.shrui(word, i32(shift)) if shift else word
        for mask, sign in ((0x000F000F, 0x00080008), (0x00F000F0, 0x00800080)):
            pairs.append(_lop(0x6A, source, i32(mask), i32(sign)))  # (x & mask) ^ sign
    return pairs


def codes_to_bf16(pair: ir.Value) -> list[ir.Value]:
    """A register of two slots' 4 codes each, as four bf16 pairs: element i of both slots."""
    pairs = []
    for i in range(4):
        source = arith.shrui(pair, i32(4 * i)) if i else pair
        # 128 + (code + 8)
        bits = _lop(0x6A, source, i32(0x000F000F), i32(0x43084308))
        exact = "fma.rn.bf16x2 $0, $1, $2, $3;"
        pairs.append(hopper.pure_asm(exact, "=r,r,r,r", [bits, i32(0x3F803F80), i32(0xC308C308)], pair.type))
    return pairs


def load_once(words: int, address: ir.Value, condition: ir.Value, offset: int = 0) -> list[ir.Value]:
    """Words of global memory that nothing reads again, zeros where the condition does not hold."""
    return hopper.load_global(words, address, condition, offset, f"{hopper.READ_ONLY}.L1::no_allocate")


class Steps:
    """The register-level steps for one shape.

    A lane is number 4 g + t of its warp. It holds scores and weights of slots g, 8 + g, 16 + g and 24 + g of a tile for
    the query rows 2 t and 2 t + 1 of each eight, and their outputs for a part of the head that depends on g.
    """

    def __init__(self, shape: DecodeShape, softmax_scale: float) -> None:
        self.shape = shape
        self.softmax_scale = softmax_scale
        self.words = shape.head_dim // 32  # of a key row that a lane loads
        self.k_steps = shape.head_dim // 16
        self.outputs = shape.head_dim // 4  # of eight query rows, that a lane holds
        self.slots = WarpSlots(shape.cut.warps, shape.cut.depth, shape.tile_bytes)
        self.scalar = plgpu.Layout.WG_SPLAT(())
        n = shape.row_blocks
        containers = {
            "queries": (2 * self.k_steps * n, jnp.int32),
            "factors": (2 * n, jnp.float32),
            "starts": (2 * n, jnp.float32),
            "limits": (2 * n, jnp.int32),
            # 4 x keys of 8 slots, scales of keys and of values
            "keys": (4 * self.words + 8, jnp.int32),
            # 8 x value words of a slot, half as long
            "values": (8 * self.words // 2, jnp.int32),
            # 4 pairs of slots for each of eight rows, and what outputs so far shrink by, of two rows
            "weights": (6 * n, jnp.int32),
            # of eight rows: maxima and sums of two, then outputs
            "state": ((4 + self.outputs) * n, jnp.float32),
        }
        self.layout = {name: hopper.container_layout(count) for name, (count, _) in containers.items()}
        self.type = {name: hopper.container_type(count, dtype) for name, (count, dtype) in containers.items()}

    def _place(self, row: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The token and the head in its group of a query row, of the first one if there is no such row; and whether."""
        exists = arith.cmpi(arith.CmpIPredicate.ult, row, i32(self.shape.rows))
        row = arith.select(exists, row, i32(0))
        return arith.divui(row, i32(self.shape.group)), arith.remui(row, i32(self.shape.group)), exists

    def load_queries(self) -> Operation:
        """``(q8, q_scale, positions, sequence, kv head) -> (queries, factors, starts, limits)``.

        The second operand of every step along the head; and per row what scores are multiplied by (for powers of two),
        what they begin with (codes are multiplied as if they were larger by 8), and how many slots it sees.
        """
        s = self.shape

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType(), self.scalar, self.scalar),
            return_type=tuple(self.type[name] for name in ("queries", "factors", "starts", "limits")),
        )
        def load(_: Any, q8: Any, q_scale: Any, positions: Any, sequence: Any, kv_head: Any) -> Any:
            word = integer(32)
            g, t, _warp = lane_parts()
            sequence, kv_head = sequence.registers.item(), kv_head.registers.item()
            first_token, first_head = arith.muli(sequence, i32(s.tokens)), arith.muli(kv_head, i32(s.group))
            queries, factors, starts, limits = [], [], [], []
            for block in range(s.row_blocks):
                token, member, exists = self._place(arith.addi(g, i32(ROWS * block)))
                head = arith.addi(first_head, member)
                row = arith.addi(arith.muli(arith.addi(first_token, token), i32(s.heads)), head)
                address = hopper.global_address(q8, 1, (row, s.head_dim), (t, s.head_dim // 4))
                start = [f32(0)] * 4
                for w in range(self.words):
                    low, high = load_once(2, address, exists, 8 * w)
                    pairs = []
                    for i in range(4):  # elements i and i + 4 of eight, as the codes of keys come
                        pair = hopper.pure_asm(f"prmt.b32 $0, $1, $2, {i | (4 + i) << 4};", "=r,r,r", [low, high], word)
                        pair = arithmetic.to_halves(pair)[0]
                        if i % 2:  # whose codes come times 16
                            pair = arithmetic.f16x2("fma.rn", pair, i32(0x2C002C00), i32(0))
                        pairs.append(pair)
                    for e in range(2):
                        eight = [i32(0x80088008)] * 2 + [i32(0x80808080)] * 2  # minus
                        start = tensor_core.multiply_tiles(start, eight, pairs[2 * e : 2 * e + 2], "f16")
                    queries += pairs
                starts += start[:2]
                for column in range(2):
                    row = arith.addi(arith.muli(t, i32(2)), i32(ROWS * block + column))
                    token, member, exists = self._place(row)
                    token = arith.addi(first_token, token)
                    head = arith.addi(first_head, member)
                    [scale] = load_once(1, hopper.global_address(q_scale, 4, (token, s.heads), (head, 1)), exists)
                    scale = arith.bitcast(ir.F32Type.get(), scale)
                    factors.append(arith.mulf(scale, f32(self.softmax_scale * LOG2_E / CODE_UNIT)))
                    [position] = load_once(1, hopper.global_address(positions, 4, (token, 1)), exists)
                    limits.append(arith.select(exists, arith.addi(position, i32(1)), i32(0)))
            return tuple(map(hopper.pack, (queries, factors, starts, limits)))

        return cast(Operation, load)

    def request(self, reads: bool) -> Operation:
        """Has each warp's tile of cache slots from ``first`` on copied, up to ``end``, rounded up to a multiple of 8.

        ``(warp, slots, arrivals, k, k scales, v, v scales, sequence, kv head, slot, first, end, [weights, values]) ->
        ()``. If somebody ``reads`` the slot before, given are the weights, which need its keys and scales, and its
        values.
        """
        s = self.shape

        @plgpu.inline_mgpu(
            arg_types=(
                self.slots.warp_layout, *[plgpu.RefType()] * 6, *[self.scalar] * 5,
                *[self.layout["weights"], self.layout["values"]] * reads,
            ),
            return_type=(),
        )  # fmt: skip
        def copy(_: Any, warp: Any, slots: Any, arrivals: Any, *others: Any) -> Any:
            (k, k_scales, v, v_scales), where, given = others[:4], others[4:9], others[9:]
            sequence, kv_head, slot, first, end = (x.registers.item() for x in where)
            [warp, zero] = hopper.unpack(warp)
            first = arith.addi(first, arith.muli(warp, i32(DECODE_TILE)))
            rows = arith.minsi(arith.maxsi(arith.subi(end, first), i32(0)), i32(DECODE_TILE))
            rows = arith.andi(arith.addi(rows, i32(DECODE_SLOTS - 1)), i32(-DECODE_SLOTS))
            pair = arith.addi(arith.muli(sequence, i32(s.kv_heads)), kv_head)
            parts, at = [], 0
            for array, row_bytes in ((k, s.head_dim // 2), (v, s.head_dim // 2), (k_scales, 2), (v_scales, 2)):
                source = hopper.global_address(array, 1, (pair, s.slots * row_bytes), (first, row_bytes))
                parts.append((source, at, arith.muli(rows, i32(row_bytes))))
                at += DECODE_TILE * row_bytes
            total = functools.reduce(arith.addi, (size for _, _, size in parts))
            needed: list[ir.Value] = []
            if reads:
                weights, values = map(hopper.unpack, given)
                needed = [*weights, *values[:: self.words // 2]]  # a register of every load
            self.slots.request(
                self.slots.place(slots, slot, warp),
                self.slots.barrier(arrivals, slot, warp),
                parts,
                total,
                needed,
                zero,
            )
            return ()

        return cast(Operation, copy)

    def take_keys(self) -> Operation:
        """``(warp, slots, arrivals, slot, parity) -> keys``: waits for a warp's tile and reads its keys and all scales.

        Values are read later: where registers hold a whole tile, a multiprocessor holds three blocks, not four.
        """
        row_bytes = self.shape.head_dim // 2

        @plgpu.inline_mgpu(
            arg_types=(self.slots.warp_layout, *[plgpu.RefType()] * 2, *[self.scalar] * 2),
            return_type=self.type["keys"],
        )
        def read(_: Any, warp: Any, slots: Any, arrivals: Any, slot: Any, parity: Any) -> Any:
            [warp, _] = hopper.unpack(warp)
            g, t, _warp = lane_parts()
            slot = slot.registers.item()
            hopper.wait_for_phase(self.slots.barrier(arrivals, slot, warp), parity.registers.item())
            place = self.slots.place(slots, slot, warp)
            keys, scales = [], []
            mine = arith.addi(arith.muli(g, i32(row_bytes)), arith.muli(t, i32(row_bytes // 4)))
            address = arith.addi(place, mine)
            for block in range(4):
                keys += hopper.load_shared(address, 8 * block * row_bytes, self.words)
            address = arith.addi(place, arith.muli(g, i32(2)))
            for array in range(2):
                for block in range(4):
                    offset = 2 * DECODE_TILE * (row_bytes + array) + 16 * block
                    scales += hopper.asm(f"ld.shared.u16 $0, [$1+{offset}];", "=r,r", [address], [integer(32)])
            return hopper.pack([*keys, *scales])

        return cast(Operation, read)

    def take_values(self) -> Operation:
        """``(warp, slots, slot) -> values``: reads a tile's, which is there."""
        row_bytes = self.shape.head_dim // 2

        @plgpu.inline_mgpu(
            arg_types=(self.slots.warp_layout, plgpu.RefType(), self.scalar), return_type=self.type["values"]
        )
        def read(_: Any, warp: Any, slots: Any, slot: Any) -> Any:
            [warp, _] = hopper.unpack(warp)
            g, t, _warp = lane_parts()
            place, values = self.slots.place(slots, slot.registers.item(), warp), []
            # Of two neighbouring slots odd lanes take the second one first: fewer lanes meet in a bank.
            odd = arith.andi(t, i32(1))
            mine = arith.addi(arith.muli(t, i32(2 * row_bytes)), arith.muli(g, i32(row_bytes // 8)))
            address = arith.addi(arith.addi(place, i32(DECODE_TILE * row_bytes)), mine)
            nearer = arith.addi(address, arith.muli(odd, i32(row_bytes)))
            other = arith.addi(address, arith.muli(arith.xori(odd, i32(1)), i32(row_bytes)))
            for offset in (0, 8, 16, 24):
                for first in (nearer, other):
                    values += hopper.load_shared(first, offset * row_bytes, self.words // 2)
            return hopper.pack(values)

        return cast(Operation, read)

    def start(self) -> Operation:
        """``zeros -> state`` of rows that have seen nothing."""

        @plgpu.inline_mgpu(arg_types=(self.layout["state"],), return_type=self.type["state"])
        def begin(_: Any, zeros: Any) -> Any:
            size = 4 + self.outputs
            return hopper.pack([f32(LOWEST) if i % size < 2 else x for i, x in enumerate(hopper.unpack(zeros))])

        return cast(Operation, begin)

    def weigh(self) -> Operation:
        """``(state, keys, queries, factors, starts, limits, first slot, end) -> state, weights`` of a warp's 32 slots.

        The state's maxima and sums are then those with these slots, its outputs those before. What a tile holds of
        slots from ``end`` on may be anything.
        """

        @plgpu.inline_mgpu(
            arg_types=(
                self.layout["state"], self.layout["keys"], self.layout["queries"], self.layout["factors"],
                self.layout["starts"], self.layout["limits"], self.scalar, self.scalar,
            ),
            return_type=(self.type["state"], self.type["weights"]),
        )  # fmt: skip
        def weigh(_: Any, state: Any, taken: Any, *others: Any) -> Any:
            *of_rows, first, end = others
            queries, factors, starts, limits = map(hopper.unpack, of_rows)
            g, _t, warp = lane_parts()
            first = arith.addi(first.registers.item(), arith.muli(warp, i32(DECODE_TILE)))
            registers, taken = hopper.unpack(state), hopper.unpack(taken)
            keys, scales = taken[: 4 * self.words], taken[4 * self.words :]
            scales = [arith.bitcast(ir.F32Type.get(), arith.shli(scale, i32(16))) for scale in scales]
            slots = [arith.addi(first, arith.addi(g, i32(8 * block))) for block in range(4)]
            v_scales = [
                arith.select(arith.cmpi(arith.CmpIPredicate.slt, slot, end.registers.item()), scale, f32(0))
                for slot, scale in zip(slots, scales[4:], strict=True)
            ]
            all_scores = self._scores(keys, queries, starts)
            weights, shrinks = [], []
            size = 4 + self.outputs
            for n, scores in enumerate(all_scores):
                state_of_rows = registers[size * n : size * (n + 1)]
                of_block: list[ir.Value] = [f32(0)] * 8
                for column in range(2):
                    row, (largest, total) = 2 * n + column, state_of_rows[column:4:2]
                    before = largest
                    mine = []
                    for block in range(4):
                        score = scores[2 * block + column]
                        score = arith.mulf(score, arith.mulf(scales[block], factors[row]))
                        seen = arith.cmpi(arith.CmpIPredicate.slt, slots[block], limits[row])
                        mine.append(arith.select(seen, score, f32(MASKED)))
                        largest = arithmetic.maximum(largest, mine[-1])
                    largest = hopper.across_lanes(largest, arithmetic.maximum, lanes=8, apart=4)
                    shrink = arithmetic.exp2(arith.subf(before, largest))
                    total = arith.mulf(total, shrink)
                    for block, score in enumerate(mine):
                        weight = arithmetic.exp2(arith.subf(score, largest))
                        total = arith.addf(total, weight)
                        of_block[2 * block + column] = arith.mulf(weight, v_scales[block])
                    registers[size * n + column], registers[size * n + 2 + column] = largest, total
                    shrinks.append(arith.bitcast(integer(32), shrink))
                # From lanes that each have two rows of a slot to lanes that each have two slots of a row.
                pairs = (arithmetic.to_bf16x2(*of_block[2 * block : 2 * block + 2]) for block in range(4))
                weights += [tensor_core.transpose_matrix(pair) for pair in pairs]
            return hopper.pack(registers), hopper.pack([*weights, *shrinks])

        return cast(Operation, weigh)

    def add_values(self) -> Operation:
        """``(state, weights, values) -> state`` with the outputs of :meth:`weigh`'s slots."""

        @plgpu.inline_mgpu(
            arg_types=(self.layout["state"], self.layout["weights"], self.layout["values"]),
            return_type=self.type["state"],
        )
        def add(_: Any, state: Any, weights: Any, values: Any) -> Any:
            registers, words, values = map(hopper.unpack, (state, weights, values))
            size, blocks = 4 + self.outputs, self.shape.row_blocks
            weights = [words[4 * n : 4 * n + 4] for n in range(blocks)]
            shrinks = [arith.bitcast(ir.F32Type.get(), word) for word in words[4 * blocks :]]
            for n in range(blocks):
                for i in range(self.outputs):
                    at = size * n + 4 + i
                    registers[at] = arith.mulf(registers[at], shrinks[2 * n + i % 2])
            for half in range(2):
                for i, operand in enumerate(self._value_operands(values, half)):
                    for n, of_rows in enumerate(weights):
                        at = size * n + 4 + 4 * i
                        registers[at : at + 4] = tensor_core.multiply_tiles(
                            registers[at : at + 4], operand, of_rows[2 * half : 2 * half + 2], "bf16"
                        )
            return hopper.pack(registers)

        return cast(Operation, add)

    def _scores(
        self, keys: Sequence[ir.Value], queries: Sequence[ir.Value], starts: Sequence[ir.Value]
    ) -> list[list[ir.Value]]:
        """Per eight query rows the products of a lane's four slots with its two rows, slot by slot."""
        scores = [[*starts[2 * n : 2 * n + 2]] * 4 for n in range(self.shape.row_blocks)]
        for half in range(2):
            for w in range(self.words):
                low, high = (codes_to_halves(keys[self.words * (2 * half + i) + w]) for i in range(2))
                for e in range(2):
                    operand = [low[2 * e], high[2 * e], low[2 * e + 1], high[2 * e + 1]]
                    for n, sums in enumerate(scores):
                        at = 2 * (self.k_steps * n + 2 * w + e)
                        sums[4 * half : 4 * half + 4] = tensor_core.multiply_tiles(
                            sums[4 * half : 4 * half + 4], operand, queries[at : at + 2], "f16"
                        )
        return scores

    def _value_operands(self, values: Sequence[ir.Value], half: int) -> list[list[ir.Value]]:
        """The first operands, 16 elements of the head each, of 16 slots' values.

        Rows g and g + 8 of operand i are the elements 2 i and 2 i + 1 of those that lane g stands for.
        """
        odd = arith.andi(utils.thread_idx(), i32(1))
        operands = []
        per_slot = self.words // 2
        for w in range(per_slot):
            slots = [values[(4 * half + i) * per_slot + w] for i in range(4)]
            # Lower and upper four codes of eight; even lanes have the slots in order, odd ones the other way round.
            for in_order, swapped in ((0x5410, 0x1054), (0x7632, 0x3276)):
                selector = arith.addi(i32(in_order), arith.muli(odd, i32(swapped - in_order)))
                pairs = [
                    codes_to_bf16(
                        hopper.pure_asm(
                            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [*slots[i : i + 2], selector], slots[0].type
                        )
                    )
                    for i in (0, 2)
                ]
                operands += [[*pairs[0][i : i + 2], *pairs[1][i : i + 2]] for i in (0, 2)]
        return operands
