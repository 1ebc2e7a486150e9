"""The register-level steps of decode attention, which :mod:`pallas_kernels.mosaic_decode` puts in order."""

import dataclasses
import math
from typing import Any, cast

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import hopper
from pallas_kernels.hopper import f32, i32
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.tiling import DECODE_ROWS, STREAMING_MULTIPROCESSORS

ROWS = DECODE_ROWS  # of a tensor core's tile
WARPS = 4
TILE = 32  # slots that a warp takes at a time
AT_ONCE = 16  # splits whose results are on their way together
LOG2_E = math.log2(math.e)
MASKED = -1e30  # finite, so that differences of two of them are no NaN


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """Static sizes.

    Attributes:
      batch: sequences.
      tokens: new tokens per sequence.
      heads: query heads.
      kv_heads: key/value heads.
      head_dim: 64 or 128.
      slots: of the cache, an even number.
      splits: blocks that share a sequence's slots.
    """

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    splits: int

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Query rows of a kv head."""
        return self.tokens * self.group


def choose_splits(batch: int, kv_heads: int, slots: int) -> int:
    """As many as run at once, two blocks per multiprocessor, each with two tiles per warp at least."""
    wanted = 2 * STREAMING_MULTIPROCESSORS // (batch * kv_heads)
    return max(1, min(wanted, slots // (2 * WARPS * TILE)))


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
    """8 two's complement codes as four float16 pairs: elements (0, 4), (1, 5), (2, 6), (3, 7)."""
    pairs = []
    for shift in (0, 8):
        source = arith.shrui(word, i32(shift)) if shift else word
        # (x & mask) ^ bits: 1024 + (code + 8) in the low four bits, 1024 + 16 (code + 8) in the next four.
        low = _lop(0x6A, source, i32(0x000F000F), i32(0x64086408))
        high = _lop(0x6A, source, i32(0x00F000F0), i32(0x64806480))
        pairs.append(hopper.pure_asm("add.rn.f16x2 $0, $1, $2;", "=r,r,r", [low, i32(0xE408E408)], word.type))
        # (1024 + 16 u) / 16 - 72 = u - 8
        scaled = "fma.rn.f16x2 $0, $1, $2, $3;"
        pairs.append(hopper.pure_asm(scaled, "=r,r,r,r", [high, i32(0x2C002C00), i32(0xD480D480)], word.type))
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


def multiply_add(sums: list[ir.Value], a: list[ir.Value], b: list[ir.Value], kind: str) -> list[ir.Value]:
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


class Steps:
    """The register-level steps for one shape."""

    def __init__(self, shape: DecodeShape, softmax_scale: float) -> None:
        self.shape = shape
        self.softmax_scale = softmax_scale
        self.words = shape.head_dim // 32  # of a key row that a lane loads
        self.k_steps = shape.head_dim // 16
        self.scalar = plgpu.Layout.WG_SPLAT(())
        containers = {
            "queries": (4 * self.k_steps, jnp.int32),
            "factors": (2, jnp.float32),
            "limits": (2, jnp.int32),
            # 4 x keys of 8 slots, 8 x value words of a slot (half as long), scales of keys and of values
            "tile": (4 * self.words + 8 * self.words // 2 + 8, jnp.int32),
            "row": (3, jnp.float32),
            # maximum and sum of two rows, then outputs
            "state": (4 + 4 * (shape.head_dim // 8), jnp.float32),
        }
        self.layout = {name: hopper.container_layout(count) for name, (count, _) in containers.items()}
        self.type = {name: hopper.container_type(count, dtype) for name, (count, dtype) in containers.items()}

    def _row(self, g: ir.Value, half: int) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The token and the head in its group of query row g + 8 half, and whether there is such a row."""
        row = arith.addi(g, i32(8 * half))
        exists = arith.cmpi(arith.CmpIPredicate.ult, row, i32(self.shape.rows))
        return arith.divui(row, i32(self.shape.group)), arith.remui(row, i32(self.shape.group)), exists

    def load_queries(self) -> Operation:
        """``(q8, q_scale, positions, sequence, kv head) -> (queries, factors, limits)``.

        The first operand of every step along the head, what a row's scores are multiplied by (for powers of two), and
        how many slots it sees.
        """
        s = self.shape

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType(), self.scalar, self.scalar),
            return_type=(self.type["queries"], self.type["factors"], self.type["limits"]),
        )
        def load(_: Any, q8: Any, q_scale: Any, positions: Any, sequence: Any, kv_head: Any) -> Any:
            word = _int(32)
            g, t, _warp = _lane_parts()
            sequence, kv_head = sequence.registers.item(), kv_head.registers.item()
            first_head = arith.muli(kv_head, i32(s.group))
            halves: list[list[ir.Value]] = []
            factors, limits = [], []
            for half in range(2):
                token, member, exists = self._row(g, half)
                token = arith.select(exists, token, i32(0))
                head = arith.addi(first_head, arith.select(exists, member, i32(0)))
                row = arith.addi(arith.muli(arith.addi(arith.muli(sequence, i32(s.tokens)), token), i32(s.heads)), head)
                address = hopper.global_address(q8, 1, (row, s.head_dim), (t, s.head_dim // 4))
                registers = []
                for w in range(self.words):
                    low, high = _load(2, address, exists, 8 * w)
                    for i in range(4):  # elements i and i + 4 of eight, as the codes of keys come
                        pair = hopper.pure_asm(f"prmt.b32 $0, $1, $2, {i | (4 + i) << 4};", "=r,r,r", [low, high], word)
                        convert = "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.rn.f16x2.e4m3x2 $0, l; }"
                        registers.append(hopper.pure_asm(convert, "=r,r", [pair], word))
                halves.append(registers)
                [scale] = _load(1, hopper.global_address(q_scale, 4, (row, 1)), exists)
                scale = arith.bitcast(ir.F32Type.get(), scale)
                factors.append(arith.mulf(scale, f32(self.softmax_scale * LOG2_E)))
                at = arith.addi(arith.muli(sequence, i32(s.tokens)), token)
                [position] = _load(1, hopper.global_address(positions, 4, (at, 1)), exists)
                limits.append(arith.select(exists, arith.addi(position, i32(1)), i32(0)))
            # Step j takes pairs 2 j and 2 j + 1: a0, a1 are rows g and g + 8 of the first, a2, a3 of the second.
            operand = [
                halves[half][2 * j + second] for j in range(self.k_steps) for second in range(2) for half in range(2)
            ]
            return hopper.pack(operand), hopper.pack(factors), hopper.pack(limits)

        return cast(Operation, load)

    def fetch(self) -> Operation:
        """``(k codes, k scales, v codes, v scales, sequence, kv head, first slot, end) -> tile``: starts to read it."""
        s = self.shape

        @plgpu.inline_mgpu(
            arg_types=(*[plgpu.RefType()] * 4, *[self.scalar] * 4),
            return_type=self.type["tile"],
        )
        def load(_: Any, k: Any, k_scales: Any, v: Any, v_scales: Any, *where: Any) -> Any:
            sequence, kv_head, first, end = (x.registers.item() for x in where)
            g, t, warp = _lane_parts()
            first = arith.addi(first, arith.muli(warp, i32(TILE)))
            pair = arith.addi(arith.muli(sequence, i32(s.kv_heads)), kv_head)
            row_bytes = s.head_dim // 2

            def exists(slot: ir.Value) -> ir.Value:
                return arith.cmpi(arith.CmpIPredicate.slt, slot, end)

            keys, values, scales = [], [], []
            for block in range(4):
                slot = arith.addi(arith.addi(first, i32(8 * block)), g)
                address = hopper.global_address(
                    k, 1, (pair, s.slots * row_bytes), (slot, row_bytes), (t, row_bytes // 4)
                )
                keys += _load(self.words, address, exists(slot))
            for step in range(2):
                for offset in (0, 1, 8, 9):
                    slot = arith.addi(arith.addi(first, i32(16 * step + offset)), arith.muli(t, i32(2)))
                    address = hopper.global_address(
                        v, 1, (pair, s.slots * row_bytes), (slot, row_bytes), (g, row_bytes // 8)
                    )
                    values += _load(self.words // 2, address, exists(slot))
            for array in (k_scales, v_scales):
                for block in range(4):  # two neighbouring slots in one word
                    slot = arith.addi(arith.addi(first, i32(8 * block)), arith.muli(t, i32(2)))
                    scales += _load(1, hopper.global_address(array, 2, (pair, s.slots), (slot, 1)), exists(slot))
            return hopper.pack([*keys, *values, *scales])

        return cast(Operation, load)

    def start(self, kind: str, maxima: int) -> Operation:
        """``zeros -> state`` of that kind of rows that have seen nothing; maxima come first."""

        @plgpu.inline_mgpu(arg_types=(self.layout[kind],), return_type=self.type[kind])
        def begin(_: Any, zeros: Any) -> Any:
            return hopper.pack([f32(MASKED)] * maxima + hopper.unpack(zeros)[maxima:])

        return cast(Operation, begin)

    def attend(self) -> Operation:
        """``(state, tile, queries, factors, limits, first slot) -> state``: a warp's 32 slots."""

        @plgpu.inline_mgpu(
            arg_types=(
                self.layout["state"], self.layout["tile"], self.layout["queries"], self.layout["factors"],
                self.layout["limits"], self.scalar,
            ),
            return_type=self.type["state"],
        )  # fmt: skip
        def add(_: Any, state: Any, tile: Any, queries: Any, factors: Any, limits: Any, first: Any) -> Any:
            _, t, warp = _lane_parts()
            first = arith.addi(first.registers.item(), arith.muli(warp, i32(TILE)))
            registers, tile = hopper.unpack(state), hopper.unpack(tile)
            maxima, sums, outputs = registers[:2], registers[2:4], registers[4:]
            queries, factors, limits = map(hopper.unpack, (queries, factors, limits))
            keys, rest = tile[: 4 * self.words], tile[4 * self.words :]
            values, scales = rest[: 4 * self.words], rest[4 * self.words :]

            def two(word: ir.Value) -> list[ir.Value]:
                single = ir.F32Type.get()
                halves = (arith.shli(word, i32(16)), arith.andi(word, i32(0xFFFF0000)))
                return [arith.bitcast(single, half) for half in halves]

            scores = []
            for block in range(4):
                part = [f32(0)] * 4
                for w in range(self.words):
                    pairs = codes_to_halves(keys[self.words * block + w])
                    for e in range(2):
                        operand = queries[4 * (2 * w + e) : 4 * (2 * w + e) + 4]
                        part = multiply_add(part, operand, pairs[2 * e : 2 * e + 2], "f16")
                k_scale = two(scales[block])
                for i in range(4):
                    half, slot = i // 2, arith.addi(first, i32(8 * block + i % 2))
                    slot = arith.addi(slot, arith.muli(t, i32(2)))
                    seen = arith.cmpi(arith.CmpIPredicate.slt, slot, limits[half])
                    score = arith.mulf(part[i], arith.mulf(k_scale[i % 2], factors[half]))
                    scores.append(arith.select(seen, score, f32(MASKED)))
            new_maxima, weights = [], [f32(0)] * 16
            for half in range(2):
                mine = [4 * block + 2 * half + i for block in range(4) for i in range(2)]
                largest = maxima[half]
                for i in mine:
                    largest = hopper.maximum(largest, scores[i])
                largest = hopper.across_lanes(largest, hopper.maximum, 4)
                new_maxima.append(largest)
                total = f32(0)
                for i in mine:
                    # Rows that see nothing yet have the masked value as their maximum.
                    masked = arith.cmpf(arith.CmpFPredicate.OLE, scores[i], f32(MASKED / 2))
                    weight = arith.select(masked, f32(0), hopper.exp2(arith.subf(scores[i], largest)))
                    total = arith.addf(total, weight)
                    weights[i] = weight
                shrink = hopper.exp2(arith.subf(maxima[half], largest))
                sums[half] = arith.addf(arith.mulf(sums[half], shrink), total)
                for i in range(0, len(outputs), 4):
                    for j in (2 * half, 2 * half + 1):
                        outputs[i + j] = arith.mulf(outputs[i + j], shrink)
            for step in range(2):
                operand = []
                for block in (2 * step, 2 * step + 1):
                    v_scale = two(scales[4 + block])
                    for half in range(2):
                        low, high = (arith.mulf(weights[4 * block + 2 * half + i], v_scale[i]) for i in range(2))
                        operand.append(hopper.to_bf16x2(low, high))
                per_slot = self.words // 2
                for w in range(per_slot):
                    slots = [values[(4 * step + i) * per_slot + w] for i in range(4)]
                    for upper, selector in enumerate((0x5410, 0x7632)):  # lower and upper four codes of eight
                        b = [
                            codes_to_bf16(
                                hopper.pure_asm(
                                    f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r", slots[i : i + 2], slots[0].type
                                )
                            )
                            for i in (0, 2)
                        ]
                        for i in range(4):
                            at = 4 * (8 * w + 4 * upper + i)
                            outputs[at : at + 4] = multiply_add(
                                outputs[at : at + 4], operand, [b[0][i], b[1][i]], "bf16"
                            )
            return hopper.pack([*new_maxima, *sums, *outputs])

        return cast(Operation, add)

    def merge(self) -> Operation:
        """``(state, shared, partial, block of results) -> ()``: the four warps' results as one, to memory.

        ``partial`` is float32 ``[blocks, 16, head_dim + 2]``: outputs that were not divided, then maximum and sum.
        """
        d = self.shape.head_dim
        pitch = d + 2

        @plgpu.inline_mgpu(
            arg_types=(self.layout["state"], plgpu.RefType(), plgpu.RefType(), self.scalar), return_type=()
        )
        def write(_: Any, state: Any, shared: Any, partial: Any, block: Any) -> Any:
            single = ir.F32Type.get()
            g, t, warp = _lane_parts()
            registers = hopper.unpack(state)
            maxima, sums, outputs = registers[:2], registers[2:4], registers[4:]
            base = hopper.shared_address(shared)
            per_lane = d // 8  # elements of the head that a group of lanes stands for
            for half in range(2):
                row = arith.addi(g, i32(8 * half))
                row = arith.muli(arith.addi(arith.muli(warp, i32(ROWS)), row), i32(4 * pitch))
                row = arith.addi(base, row)
                total = hopper.across_lanes(sums[half], arith.addf, 4)
                for j in range(d // 8):
                    for e in range(2):
                        element = arith.addi(arith.muli(t, i32(2 * per_lane)), i32(e * per_lane + j))
                        at = arith.addi(row, arith.muli(element, i32(4)))
                        hopper.asm("st.shared.f32 [$0], $1;", "r,f", [at, outputs[4 * j + 2 * half + e]], [])
                hopper.asm(f"st.shared.f32 [$0+{4 * d}], $1;", "r,f", [row, maxima[half]], [])
                hopper.asm(f"st.shared.f32 [$0+{4 * d + 4}], $1;", "r,f", [row, total], [])
            hopper.block_barrier()
            thread = utils.thread_idx()
            # Thread i takes element i of every row it reaches.
            rows_at_once = max(1, 128 // d)
            element = arith.andi(thread, i32(d - 1))
            first_row = arith.divui(thread, i32(d)) if rows_at_once > 1 else i32(0)

            def read(address: ir.Value, offset: int) -> ir.Value:
                return hopper.asm(f"ld.shared.f32 $0, [$1+{offset}];", "=f,r", [address], [single])[0]

            for i in range(0, ROWS, rows_at_once):
                if i >= self.shape.rows:
                    break
                row = arith.addi(first_row, i32(i))
                at = arith.addi(base, arith.muli(row, i32(4 * pitch)))
                step = 4 * pitch * ROWS
                peaks = [read(at, w * step + 4 * d) for w in range(WARPS)]
                largest = peaks[0]
                for peak in peaks[1:]:
                    largest = hopper.maximum(largest, peak)
                mine = arith.addi(at, arith.muli(element, i32(4)))
                out, total = f32(0), f32(0)
                for w in range(WARPS):
                    weight = hopper.exp2(arith.subf(peaks[w], largest))
                    out = arith.addf(out, arith.mulf(read(mine, w * step), weight))
                    total = arith.addf(total, arith.mulf(read(at, w * step + 4 * d + 4), weight))
                target = hopper.global_address(partial, 4, (block.registers.item(), ROWS * pitch), (row, pitch))
                place = arith.addi(target, arith.extui(_int(64), arith.muli(element, i32(4))))
                hopper.asm("st.global.f32 [$0], $1;", "l,f", [place, out], [])
                leads = arith.extui(_int(32), arith.cmpi(arith.CmpIPredicate.eq, element, i32(0)))
                hopper.asm(
                    "{ .reg .pred p; setp.ne.b32 p, $3, 0; "
                    f"@p st.global.f32 [$0+{4 * d}], $1; @p st.global.f32 [$0+{4 * d + 4}], $2; }}",
                    "l,f,f,r", [target, largest, total, leads], [],
                )  # fmt: skip
            return ()

        return cast(Operation, write)

    def collect(self) -> Operation:
        """``(state, partial, row of results, first split) -> state``: takes ``AT_ONCE`` splits' results of a row.

        A thread's state is the maximum, the sum and its element of the output. Query rows are counted over all
        sequences and kv heads.
        """
        s = self.shape
        pitch = s.head_dim + 2

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
                exists = arith.cmpi(arith.CmpIPredicate.slt, split, i32(s.splits))
                block = arith.addi(arith.muli(pair, i32(s.splits)), split)
                address = hopper.global_address(partial, 4, (block, ROWS * pitch), (row, pitch))
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
        size = jnp.dtype(out_dtype).itemsize

        @plgpu.inline_mgpu(arg_types=(self.layout["row"], plgpu.RefType(), self.scalar), return_type=())
        def write(_: Any, state: Any, y: Any, row: Any) -> Any:
            _largest, total, out = hopper.unpack(state)
            row, element = row.registers.item(), utils.thread_idx()
            pair, row = arith.divui(row, i32(s.rows)), arith.remui(row, i32(s.rows))
            sequence, kv_head = arith.divui(pair, i32(s.kv_heads)), arith.remui(pair, i32(s.kv_heads))
            token, member = arith.divui(row, i32(s.group)), arith.remui(row, i32(s.group))
            place = hopper.global_address(
                y, size, (sequence, s.tokens * s.heads * s.head_dim), (token, s.heads * s.head_dim),
                (kv_head, s.group * s.head_dim), (member, s.head_dim), (element, 1),
            )  # fmt: skip
            exists = arith.extui(_int(32), arith.cmpi(arith.CmpIPredicate.ult, element, i32(s.head_dim)))
            store = {
                4: "@p st.global.f32 [$0], q;",
                2: "cvt.rn.bf16.f32 b, q; @p st.global.b16 [$0], b;",
            }[size]
            hopper.asm(
                "{ .reg .pred p; .reg .b16 b; .reg .f32 q; setp.ne.b32 p, $3, 0; div.rn.f32 q, $1, $2; " + store + " }",
                "l,f,f,r", [place, out, total, exists], [],
            )  # fmt: skip
            return ()

        return cast(Operation, write)
