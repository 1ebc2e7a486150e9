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

from pallas_kernels import hopper
from pallas_kernels.hopper import f32, i32
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.tiling import DECODE_SLOTS, STREAMING_MULTIPROCESSORS

ROWS = 8  # query rows that a tensor core's product takes together
TILE = 32  # slots that a warp takes at a time
AT_ONCE = 16  # splits whose results are on their way together
LOG2_E = math.log2(math.e)
# A hidden slot's score, and what a row's maximum begins with: so far apart that no hidden slot weighs anything, and
# finite, so that differences are no NaN.
MASKED, LOWEST = -3e38, -1e25
CODE_UNIT = 2.0**-24  # what a code of 1 is worth when its bits are those of a subnormal float16


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the cache of a sequence and kv head is cut into pieces.

    Attributes:
      splits: blocks that share its slots.
      warps: of a block, 4 or 8.
      depth: tiles of each warp that are on their way or at work.
    """

    splits: int
    warps: int = 4
    depth: int = 2


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
    cut: Cut

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
        return TILE * (self.head_dim + 4)

    @property
    def shared_words(self) -> int:
        """Of tiles, and later of the warps' results in their place."""
        return self.cut.warps * max(self.cut.depth * self.tile_bytes // 4, self.row_blocks * ROWS * self.pitch)


def choose_cut(batch: int, kv_heads: int, slots: int) -> Cut:
    """What was fastest among the shapes that were tried (docs/kernels.md), for a cache that is full.

    Blocks of one wave need no second kernel if there is one per multiprocessor; where there are several, finer pieces
    leave less of the device idle at the end. Else as many splits as run at once, two blocks per multiprocessor, each
    with two tiles per warp or more, or one where that would leave few splits.
    """
    pairs = batch * kv_heads
    if pairs > STREAMING_MULTIPROCESSORS:
        return Cut(2 if slots >= 2048 else 1)
    if pairs >= 3 * STREAMING_MULTIPROCESSORS // 4:
        return Cut(1, warps=8)
    rounds = -(-slots // (4 * TILE))
    wanted = min(2 * STREAMING_MULTIPROCESSORS // pairs, max(8, rounds // 2), rounds)
    return Cut(-(-rounds // -(-rounds // wanted)))


def _int(bits: int) -> Any:
    return ir.IntegerType.get_signless(bits)


def _lane_parts() -> tuple[ir.Value, ir.Value, ir.Value]:
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


def multiply_add(sums: Sequence[ir.Value], a: Sequence[ir.Value], b: Sequence[ir.Value], kind: str) -> list[ir.Value]:
    """m16n8k16 of "f16" or "bf16" operands."""
    return hopper.asm(
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [*a, *b, *sums], [ir.F32Type.get()] * 4,
    )  # fmt: skip


def _load(words: int, address: ir.Value, condition: ir.Value, offset: int = 0) -> list[ir.Value]:
    """Words of global memory, zeros where the condition does not hold."""
    flag = arith.extui(_int(32), condition)
    out = [f"${i}" for i in range(words)]
    vector = f".v{words}" if words > 1 else ""
    listed = "{" + ", ".join(out) + "}" if words > 1 else out[0]
    zeros = " ".join(f"mov.b32 {register}, 0;" for register in out)
    return hopper.asm(
        f"{{ .reg .pred p; setp.ne.b32 p, ${words + 1}, 0; {zeros} "
        f"@p ld.global.nc.L1::no_allocate{vector}.b32 {listed}, [${words}+{offset}]; }}",
        ",".join(["=&r"] * words + ["l", "r"]), [address, flag], [_int(32)] * words,
    )  # fmt: skip


def _load_shared(words: int, address: ir.Value, offset: int) -> list[ir.Value]:
    """1, 2 or 4 words of shared memory."""
    out = ", ".join(f"${i}" for i in range(words))
    vector, listed = (f".v{words}", f"{{{out}}}") if words > 1 else ("", out)
    ptx = f"ld.shared{vector}.b32 {listed}, [${words}+{offset}];"
    return hopper.asm(ptx, ",".join(["=r"] * words + ["r"]), [address], [_int(32)] * words)


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
        self.slots = hopper.WarpSlots(shape.cut.warps, shape.cut.depth, shape.tile_bytes)
        self.scalar = plgpu.Layout.WG_SPLAT(())
        n = shape.row_blocks
        containers = {
            "queries": (2 * self.k_steps * n, jnp.int32),
            "factors": (2 * n, jnp.float32),
            "starts": (2 * n, jnp.float32),
            "limits": (2 * n, jnp.int32),
            # 4 x keys of 8 slots, 8 x value words of a slot (half as long), scales of keys and of values
            "tile": (4 * self.words + 8 * self.words // 2 + 8, jnp.int32),
            "row": (3, jnp.float32),
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
            word = _int(32)
            g, t, _warp = _lane_parts()
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
                    low, high = _load(2, address, exists, 8 * w)
                    pairs = []
                    for i in range(4):  # elements i and i + 4 of eight, as the codes of keys come
                        pair = hopper.pure_asm(f"prmt.b32 $0, $1, $2, {i | (4 + i) << 4};", "=r,r,r", [low, high], word)
                        convert = "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.rn.f16x2.e4m3x2 $0, l; }"
                        pair = hopper.pure_asm(convert, "=r,r", [pair], word)
                        if i % 2:  # whose codes come times 16
                            sixteenth = "fma.rn.f16x2 $0, $1, $2, $3;"
                            operands = [pair, i32(0x2C002C00), i32(0)]
                            pair = hopper.pure_asm(sixteenth, "=r,r,r,r", operands, word)
                        pairs.append(pair)
                    for e in range(2):
                        eight = [i32(0x80088008)] * 2 + [i32(0x80808080)] * 2  # minus
                        start = multiply_add(start, eight, pairs[2 * e : 2 * e + 2], "f16")
                    queries += pairs
                starts += start[:2]
                for column in range(2):
                    row = arith.addi(arith.muli(t, i32(2)), i32(ROWS * block + column))
                    token, member, exists = self._place(row)
                    token = arith.addi(first_token, token)
                    head = arith.addi(first_head, member)
                    [scale] = _load(1, hopper.global_address(q_scale, 4, (token, s.heads), (head, 1)), exists)
                    scale = arith.bitcast(ir.F32Type.get(), scale)
                    factors.append(arith.mulf(scale, f32(self.softmax_scale * LOG2_E / CODE_UNIT)))
                    [position] = _load(1, hopper.global_address(positions, 4, (token, 1)), exists)
                    limits.append(arith.select(exists, arith.addi(position, i32(1)), i32(0)))
            return tuple(map(hopper.pack, (queries, factors, starts, limits)))

        return cast(Operation, load)

    def open_slots(self) -> Operation:
        """``(arrivals) -> ()``: makes the barriers of each warp's slots."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=())
        def make(_: Any, arrivals: Any) -> Any:
            self.slots.open(arrivals)
            return ()

        return cast(Operation, make)

    def request(self) -> Operation:
        """``(slots, arrivals, k, k scales, v, v scales, sequence, kv head, slot, first, end) -> ()``.

        Has each warp's tile of cache slots from ``first`` on copied, up to ``end``, rounded up to a multiple of 8.
        """
        s = self.shape

        @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 6, *[self.scalar] * 5), return_type=())
        def copy(_: Any, slots: Any, arrivals: Any, k: Any, k_scales: Any, v: Any, v_scales: Any, *where: Any) -> Any:
            sequence, kv_head, slot, first, end = (x.registers.item() for x in where)
            first = arith.addi(first, arith.muli(arith.shrui(utils.thread_idx(), i32(5)), i32(TILE)))
            rows = arith.minsi(arith.maxsi(arith.subi(end, first), i32(0)), i32(TILE))
            rows = arith.andi(arith.addi(rows, i32(DECODE_SLOTS - 1)), i32(-DECODE_SLOTS))
            wanted = arith.extui(_int(32), arith.cmpi(arith.CmpIPredicate.ne, rows, i32(0)))
            pair = arith.addi(arith.muli(sequence, i32(s.kv_heads)), kv_head)
            parts, at = [], 0
            for array, row_bytes in ((k, s.head_dim // 2), (v, s.head_dim // 2), (k_scales, 2), (v_scales, 2)):
                source = hopper.global_address(array, 1, (pair, s.slots * row_bytes), (first, row_bytes))
                parts.append((source, at, arith.muli(rows, i32(row_bytes))))
                at += TILE * row_bytes
            self.slots.request(self.slots.place(slots, slot), self.slots.barrier(arrivals, slot), parts, wanted)
            return ()

        return cast(Operation, copy)

    def take(self) -> Operation:
        """``(slots, arrivals, slot, parity) -> tile``: waits for a warp's tile and reads it into registers."""
        row_bytes = self.shape.head_dim // 2

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.RefType(), self.scalar, self.scalar), return_type=self.type["tile"]
        )
        def read(_: Any, slots: Any, arrivals: Any, slot: Any, parity: Any) -> Any:
            g, t, _warp = _lane_parts()
            slot = slot.registers.item()
            hopper.wait_for_phase(self.slots.barrier(arrivals, slot), parity.registers.item())
            place = self.slots.place(slots, slot)
            keys, values, scales = [], [], []
            mine = arith.addi(arith.muli(g, i32(row_bytes)), arith.muli(t, i32(row_bytes // 4)))
            address = arith.addi(place, mine)
            for block in range(4):
                keys += _load_shared(self.words, address, 8 * block * row_bytes)
            # Of two neighbouring slots odd lanes take the second one first: fewer lanes meet in a bank.
            odd = arith.andi(t, i32(1))
            mine = arith.addi(arith.muli(t, i32(2 * row_bytes)), arith.muli(g, i32(row_bytes // 8)))
            address = arith.addi(arith.addi(place, i32(TILE * row_bytes)), mine)
            nearer = arith.addi(address, arith.muli(odd, i32(row_bytes)))
            other = arith.addi(address, arith.muli(arith.xori(odd, i32(1)), i32(row_bytes)))
            for offset in (0, 8, 16, 24):
                for first in (nearer, other):
                    values += _load_shared(self.words // 2, first, offset * row_bytes)
            address = arith.addi(place, arith.muli(g, i32(2)))
            for array in range(2):
                for block in range(4):
                    offset = 2 * TILE * (row_bytes + array) + 16 * block
                    scales += hopper.asm(f"ld.shared.u16 $0, [$1+{offset}];", "=r,r", [address], [_int(32)])
            return hopper.pack([*keys, *values, *scales])

        return cast(Operation, read)

    def start(self, kind: str) -> Operation:
        """``zeros -> state`` of that kind of rows that have seen nothing; maxima come first."""
        at = {"row": [0], "state": [i for n in range(self.shape.row_blocks) for i in self._maxima_at(n)]}[kind]

        @plgpu.inline_mgpu(arg_types=(self.layout[kind],), return_type=self.type[kind])
        def begin(_: Any, zeros: Any) -> Any:
            return hopper.pack([f32(LOWEST) if i in at else zero for i, zero in enumerate(hopper.unpack(zeros))])

        return cast(Operation, begin)

    def _maxima_at(self, block: int) -> tuple[int, int]:
        """Where a state has the maxima of a lane's rows of the block."""
        return (4 + self.outputs) * block, (4 + self.outputs) * block + 1

    def attend(self) -> Operation:
        """``(state, tile, queries, factors, starts, limits, first slot, end) -> state``: a warp's 32 slots.

        What the tile holds of slots from ``end`` on may be anything.
        """

        @plgpu.inline_mgpu(
            arg_types=(
                self.layout["state"], self.layout["tile"], self.layout["queries"], self.layout["factors"],
                self.layout["starts"], self.layout["limits"], self.scalar, self.scalar,
            ),
            return_type=self.type["state"],
        )  # fmt: skip
        def add(_: Any, state: Any, tile: Any, *others: Any) -> Any:
            *of_rows, first, end = others
            queries, factors, starts, limits = map(hopper.unpack, of_rows)
            g, _t, warp = _lane_parts()
            first = arith.addi(first.registers.item(), arith.muli(warp, i32(TILE)))
            registers, tile = hopper.unpack(state), hopper.unpack(tile)
            keys, rest = tile[: 4 * self.words], tile[4 * self.words :]
            values, scales = rest[: 4 * self.words], rest[4 * self.words :]
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
                        largest = hopper.maximum(largest, mine[-1])
                    largest = hopper.across_lanes(largest, hopper.maximum, lanes=8, apart=4)
                    shrink = hopper.exp2(arith.subf(before, largest))
                    total = arith.mulf(total, shrink)
                    for block, score in enumerate(mine):
                        weight = hopper.exp2(arith.subf(score, largest))
                        total = arith.addf(total, weight)
                        of_block[2 * block + column] = arith.mulf(weight, v_scales[block])
                    registers[size * n + column], registers[size * n + 2 + column] = largest, total
                    shrinks.append(shrink)
                # From lanes that each have two rows of a slot to lanes that each have two slots of a row.
                pairs = (hopper.to_bf16x2(*of_block[2 * block : 2 * block + 2]) for block in range(4))
                weights.append([hopper.transpose_matrix(pair) for pair in pairs])
            for n in range(self.shape.row_blocks):
                for i in range(self.outputs):
                    at = size * n + 4 + i
                    registers[at] = arith.mulf(registers[at], shrinks[2 * n + i % 2])
            for half in range(2):
                for i, operand in enumerate(self._value_operands(values, half)):
                    for n, of_rows in enumerate(weights):
                        at = size * n + 4 + 4 * i
                        registers[at : at + 4] = multiply_add(
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
                        sums[4 * half : 4 * half + 4] = multiply_add(
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

    def merge(self, out_dtype: Any) -> Operation:
        """``(state, shared, results, block, sequence, kv head) -> ()``: the warps' results as one, to memory.

        Results are those of the splits, float32 ``[blocks, rows, pitch]``, or ``y`` if there is but one split.
        """
        s = self.shape
        d, pitch = s.head_dim, s.pitch

        @plgpu.inline_mgpu(
            arg_types=(self.layout["state"], plgpu.RefType(), plgpu.RefType(), *[self.scalar] * 3), return_type=()
        )
        def write(_: Any, state: Any, shared: Any, results: Any, *where: Any) -> Any:
            block, sequence, kv_head = (x.registers.item() for x in where)
            g, t, warp = _lane_parts()
            registers = hopper.unpack(state)
            base = hopper.shared_address(shared)
            hopper.block_barrier()  # all warps have read their last tiles, where results go
            size = 4 + self.outputs
            for n in range(s.row_blocks):
                for column in range(2):
                    largest, total = registers[size * n + column : size * n + 4 : 2]
                    total = hopper.across_lanes(total, arith.addf, lanes=8, apart=4)
                    row = arith.addi(arith.muli(t, i32(2)), i32(ROWS * n + column))
                    row = arith.addi(arith.muli(warp, i32(s.row_blocks * ROWS)), row)
                    place = arith.addi(base, arith.muli(row, i32(4 * pitch)))
                    hopper.asm(f"st.shared.v2.f32 [$0+{4 * d}], {{$1, $2}};", "r,f,f", [place, largest, total], [])
                    # A lane's outputs are neighbours in the head.
                    place = arith.addi(place, arith.muli(g, i32(4 * (d // 8))))
                    mine = [registers[size * n + 4 + i] for i in range(column, self.outputs, 2)]
                    for i in range(0, len(mine), 4):
                        hopper.asm(
                            f"st.shared.v4.f32 [$0+{4 * i}], {{$1, $2, $3, $4}};",
                            "r,f,f,f,f",
                            [place, *mine[i : i + 4]],
                            [],
                        )
            hopper.block_barrier()
            thread = utils.thread_idx()
            # Thread i takes element i of every row it reaches.
            rows_at_once = 32 * s.cut.warps // d
            element, first_row = arith.andi(thread, i32(d - 1)), arith.divui(thread, i32(d))

            def read(address: ir.Value, offset: int) -> ir.Value:
                return hopper.asm(f"ld.shared.f32 $0, [$1+{offset}];", "=f,r", [address], [ir.F32Type.get()])[0]

            for i in range(0, s.rows, rows_at_once):
                row = arith.addi(first_row, i32(i))
                at = arith.addi(base, arith.muli(row, i32(4 * pitch)))
                step = 4 * pitch * s.row_blocks * ROWS
                peaks = [read(at, w * step + 4 * d) for w in range(s.cut.warps)]
                largest = functools.reduce(hopper.maximum, peaks)
                mine = arith.addi(at, arith.muli(element, i32(4)))
                out, total = f32(0), f32(0)
                for w in range(s.cut.warps):
                    weight = hopper.exp2(arith.subf(peaks[w], largest))
                    out = arith.addf(out, arith.mulf(read(mine, w * step), weight))
                    total = arith.addf(total, arith.mulf(read(at, w * step + 4 * d + 4), weight))
                exists = arith.cmpi(arith.CmpIPredicate.ult, row, i32(s.rows))
                if s.cut.splits == 1:
                    self._store_result(results, out_dtype, sequence, kv_head, row, element, out, total, exists)
                else:
                    target = hopper.global_address(results, 4, (block, s.rows * pitch), (row, pitch))
                    self._store_part(target, element, out, largest, total, exists)
            return ()

        return cast(Operation, write)

    def _store_part(
        self, target: ir.Value, element: ir.Value, out: ir.Value, largest: ir.Value, total: ir.Value, exists: ir.Value
    ) -> None:
        """A split's result of a row, whose first thread brings its maximum and sum, too."""
        place = arith.addi(target, arith.extui(_int(64), arith.muli(element, i32(4))))
        store = "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.f32 [$0], $1; }"
        hopper.asm(store, "l,f,r", [place, out, arith.extui(_int(32), exists)], [])
        leads = arith.andi(exists, arith.cmpi(arith.CmpIPredicate.eq, element, i32(0)))
        behind = 4 * self.shape.head_dim
        hopper.asm(
            f"{{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.v2.f32 [$0+{behind}], {{$1, $2}}; }}",
            "l,f,f,r", [target, largest, total, arith.extui(_int(32), leads)], [],
        )  # fmt: skip

    def _store_result(
        self, y: Any, out_dtype: Any, sequence: ir.Value, kv_head: ir.Value, row: ir.Value, element: ir.Value,
        out: ir.Value, total: ir.Value, exists: ir.Value,
    ) -> None:  # fmt: skip
        """An element of a query row of ``[b, t, h, d]``, divided by the row's sum."""
        s = self.shape
        size = jnp.dtype(out_dtype).itemsize
        token, member = arith.divui(row, i32(s.group)), arith.remui(row, i32(s.group))
        place = hopper.global_address(
            y, size, (sequence, s.tokens * s.heads * s.head_dim), (token, s.heads * s.head_dim),
            (kv_head, s.group * s.head_dim), (member, s.head_dim), (element, 1),
        )  # fmt: skip
        store = {
            4: "@p st.global.f32 [$0], q;",
            2: "cvt.rn.bf16.f32 b, q; @p st.global.b16 [$0], b;",
        }[size]
        hopper.asm(
            "{ .reg .pred p; .reg .b16 b; .reg .f32 q; setp.ne.b32 p, $3, 0; div.rn.f32 q, $1, $2; " + store + " }",
            "l,f,f,r", [place, out, total, arith.extui(_int(32), exists)], [],
        )  # fmt: skip

    def collect(self) -> Operation:
        """``(state, partial, row of results, first split) -> state``: takes ``AT_ONCE`` splits' results of a row.

        A thread's state is the maximum, the sum and its element of the output. Query rows are counted over all
        sequences and kv heads.
        """
        s = self.shape

        @plgpu.inline_mgpu(
            arg_types=(self.layout["row"], plgpu.RefType(), self.scalar, self.scalar), return_type=self.type["row"]
        )
        def add(_: Any, state: Any, partial: Any, row: Any, first: Any) -> Any:
            single = ir.F32Type.get()
            largest, total, out = hopper.unpack(state)
            row, element = row.registers.item(), arith.andi(utils.thread_idx(), i32(s.head_dim - 1))
            pair, row = arith.divui(row, i32(s.rows)), arith.remui(row, i32(s.rows))
            parts = []
            for i in range(AT_ONCE):
                split = arith.addi(first.registers.item(), i32(i))
                exists = arith.cmpi(arith.CmpIPredicate.slt, split, i32(s.cut.splits))
                block = arith.addi(arith.muli(pair, i32(s.cut.splits)), split)
                address = hopper.global_address(partial, 4, (block, s.rows * s.pitch), (row, s.pitch))
                mine = arith.addi(address, arith.extui(_int(64), arith.muli(element, i32(4))))
                words = [_load(1, mine, exists), *(_load(1, address, exists, 4 * (s.head_dim + j)) for j in (0, 1))]
                value, peak, weight = (arith.bitcast(single, word) for [word] in words)
                parts.append((value, arith.select(exists, peak, f32(MASKED)), weight))
            highest = largest
            for _value, peak, _weight in parts:
                highest = hopper.maximum(highest, peak)
            shrink = hopper.exp2(arith.subf(largest, highest))
            total, out = arith.mulf(total, shrink), arith.mulf(out, shrink)
            for value, peak, weight in parts:
                factor = hopper.exp2(arith.subf(peak, highest))
                total = arith.addf(total, arith.mulf(weight, factor))
                out = arith.addf(out, arith.mulf(value, factor))
            return hopper.pack([highest, total, out])

        return cast(Operation, add)

    def finish_row(self, out_dtype: Any) -> Operation:
        """``(state, y, row of results) -> ()``: divides by the sum and writes a row of ``[b, t, h, d]``."""
        s = self.shape

        @plgpu.inline_mgpu(arg_types=(self.layout["row"], plgpu.RefType(), self.scalar), return_type=())
        def write(_: Any, state: Any, y: Any, row: Any) -> Any:
            _largest, total, out = hopper.unpack(state)
            row, element = row.registers.item(), utils.thread_idx()
            pair, row = arith.divui(row, i32(s.rows)), arith.remui(row, i32(s.rows))
            sequence, kv_head = arith.divui(pair, i32(s.kv_heads)), arith.remui(pair, i32(s.kv_heads))
            exists = arith.cmpi(arith.CmpIPredicate.ult, element, i32(s.head_dim))
            self._store_result(y, out_dtype, sequence, kv_head, row, element, out, total, exists)
            return ()

        return cast(Operation, write)
