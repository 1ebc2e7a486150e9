"""The register-level steps of prefill attention, which :mod:`pallas_kernels.mosaic_prefill` puts in order."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import hopper
from pallas_kernels.hopper import f32, i32
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.reference import SCALE_TOKENS

ROWS = 64  # query rows of a warpgroup
LOG2_E = math.log2(math.e)
# exp(score - max) is multiplied by 2 to this power before it is rounded to e4m3.
WEIGHT_EXPONENT = 7.0
# A hidden key's score, and what a row's maximum begins with: so far apart that no hidden key of a row that has not seen
# any other weighs anything, and finite, so that differences are no NaN.
MASKED, LOWEST = -3e38, -1e25
# A maximum may lag behind by as much, of powers of two: 2^8.75 is still rounded to something below the largest e4m3.
SLACK = 8.75 - WEIGHT_EXPONENT
# Of ones, beside the values: the tensor core sums the weights, too, as they are when rounded.
SUM_COLUMNS = 8
SMALLEST_FACTOR = 1e-12  # under which scores are alike anyway, and MASKED would not stay below LOWEST


@dataclasses.dataclass(frozen=True)
class PrefillShape:
    """Static sizes.

    Attributes:
      batch: sequences.
      tokens: new tokens per sequence, padding included.
      heads: query heads.
      kv_heads: key/value heads.
      head_dim: 64 or 128.
      cached: keys that a sequence may have before the new tokens', together with which they are rounded.
    """

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    cached: int = 0

    @property
    def key_blocks(self) -> int:
        """Of a sequence."""
        return -(-(self.cached + self.tokens) // self.keys)

    @property
    def keys(self) -> int:
        """Of a block, which share a scale."""
        return SCALE_TOKENS


class Steps:
    """The register-level steps for one shape.

    A thread's registers of 64 query rows are those of the tensor core: of rows r and r + 8 of its warp's 16, columns
    8 c + 2 t and 8 c + 2 t + 1 for each c, where its lane is 4 r + t.
    """

    def __init__(self, shape: PrefillShape, softmax_scale: float) -> None:
        self.shape, self.softmax_scale = shape, softmax_scale
        d, n = shape.head_dim, shape.keys
        self.scalar = plgpu.Layout.WG_SPLAT(())
        containers = {
            "queries": (d // 8, jnp.int32),
            "factors": (2, jnp.float32),
            "limits": (2, jnp.int32),
            "scores": (n // 2, jnp.float32),
            "weights": (n // 8, jnp.int32),
            "output": ((d + SUM_COLUMNS) // 2, jnp.float32),
            "pair": (2, jnp.float32),
            "flag": (1, jnp.int32),
        }
        self.layout = {name: hopper.container_layout(count) for name, (count, _) in containers.items()}
        self.type = {name: hopper.container_type(count, dtype) for name, (count, dtype) in containers.items()}
        self.key_swizzle = (cast(Any, plgpu.SwizzleTransform)(d),)
        self.value_swizzle = (cast(Any, plgpu.SwizzleTransform)(n),)
        self.output_swizzle = (cast(Any, plgpu.SwizzleTransform)(128),)

    def _row(self) -> tuple[ir.Value, ir.Value]:
        """The first of a thread's two rows among the warpgroup's 64, and its t."""
        thread = hopper.thread_in_warpgroup()
        lane, warp = arith.andi(thread, i32(31)), arith.shrui(thread, i32(5))
        return arith.addi(arith.muli(warp, i32(16)), arith.shrui(lane, i32(2))), arith.andi(lane, i32(3))

    def _matrix_row(self) -> tuple[ir.Value, ir.Value]:
        """The row whose address a lane gives for four matrices of 8 rows by 16 bytes, and its chunk of 16 bytes.

        Lanes 0 to 7 and 8 to 15 of a warp have rows 0 to 7 and 8 to 15 of its 16, the others those of the next chunk.
        """
        thread = hopper.thread_in_warpgroup()
        lane, warp = arith.andi(thread, i32(31)), arith.shrui(thread, i32(5))
        row = arith.addi(arith.muli(warp, i32(16)), arith.andi(lane, i32(15)))
        return row, arith.shrui(lane, i32(4))

    def load_rows(self) -> Operation:
        """``(q_scale, lengths, sequence, head, first row, start) -> (factors, limits)``.

        What scores are multiplied by (beside the keys' scales), and the last key that each of a thread's rows sees.
        """
        s = self.shape

        @plgpu.inline_mgpu(
            arg_types=(*[plgpu.RefType()] * 2, *[self.scalar] * 4),
            return_type=(self.type["factors"], self.type["limits"]),
        )
        def load(_: Any, q_scale: Any, lengths: Any, *where: Any) -> Any:
            word, single = ir.IntegerType.get_signless(32), ir.F32Type.get()
            sequence, head, first, start = (x.registers.item() for x in where)
            row, _t = self._row()
            row = arith.addi(first, row)

            def read(address: ir.Value, exists: ir.Value) -> ir.Value:
                return hopper.asm(
                    "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.nc.b32 $0, [$1]; }",
                    "=&r,l,r", [address, exists], [word],
                )[0]  # fmt: skip

            scale = f32(self.softmax_scale * LOG2_E)
            # An empty sequence sees its first key, for want of another one: what comes out must be finite.
            length = arith.maxsi(read(hopper.global_address(lengths, 4, (sequence, 1)), i32(1)), i32(1))
            factors, limits = [], []
            for half in range(2):
                token = arith.addi(row, i32(8 * half))
                exists = arith.extui(word, arith.cmpi(arith.CmpIPredicate.ult, token, i32(s.tokens)))
                place = arith.addi(arith.muli(sequence, i32(s.tokens)), token)
                place = arith.addi(arith.muli(place, i32(s.heads)), head)
                factor = read(hopper.global_address(q_scale, 4, (place, 1)), exists)
                factors.append(arith.mulf(arith.bitcast(single, factor), scale))
                limits.append(arith.addi(start, arith.minsi(token, arith.subi(length, i32(1)))))
            return hopper.pack(factors), hopper.pack(limits)

        return cast(Operation, load)

    def load_queries(self) -> Operation:
        """``tile [64, d] in shared memory -> queries``, the register operand of the first product."""
        d = self.shape.head_dim

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(self.key_swizzle),), return_type=self.type["queries"])
        def load(_: Any, tile: Any) -> Any:
            row, second = self._matrix_row()
            base = arith.addi(hopper.shared_address(tile), arith.muli(row, i32(d)))
            # Where the swizzle puts a row's chunks of 16 bytes: it has a period of eight lines of 128 bytes.
            turn = arith.andi(arith.shrui(arith.muli(row, i32(d)), i32(7)), i32(d // 16 - 1))
            registers: list[ir.Value] = []
            for step in range(d // 32):
                chunk = arith.xori(arith.addi(second, i32(2 * step)), turn)
                place = arith.addi(base, arith.muli(chunk, i32(16)))
                registers += hopper.load_matrices(place, 4, transposed=False)
            return hopper.pack(registers)

        return cast(Operation, load)

    def load_scales(self) -> Operation:
        """``(k_scale, v_scale, sequence, kv head, block of keys) -> scales``: of the block's keys and of its values."""
        s = self.shape

        @plgpu.inline_mgpu(
            arg_types=(*[plgpu.RefType()] * 2, *[self.scalar] * 3), return_type=self.type["pair"]
        )  # fmt: skip
        def load(_: Any, k_scale: Any, v_scale: Any, *where: Any) -> Any:
            sequence, kv_head, block = (x.registers.item() for x in where)
            head = arith.addi(arith.muli(sequence, i32(s.kv_heads)), kv_head)
            addresses = [hopper.global_address(ref, 4, (head, s.key_blocks), (block, 1)) for ref in (k_scale, v_scale)]
            load = "ld.global.nc.f32 $0, [$1];"
            return hopper.pack([hopper.asm(load, "=f,l", [at], [ir.F32Type.get()])[0] for at in addresses])

        return cast(Operation, load)

    def start(self) -> Operation:
        """``zeros -> maxima`` of rows that have seen nothing."""

        @plgpu.inline_mgpu(arg_types=(self.layout["pair"],), return_type=self.type["pair"])
        def begin(_: Any, zeros: Any) -> Any:
            return hopper.pack([f32(LOWEST)] * len(hopper.unpack(zeros)))

        return cast(Operation, begin)

    def score(self) -> Operation:
        """``(scores, queries, keys) -> scores``: issues the product with a block of keys, which is left to run."""

        @plgpu.inline_mgpu(
            arg_types=(self.layout["scores"], self.layout["queries"], plgpu.RefType(self.key_swizzle)),
            return_type=self.type["scores"],
        )
        def issue(_: Any, scores: Any, queries: Any, keys: Any) -> Any:
            descriptor = hopper.k_major_descriptor(hopper.shared_address(keys), self.shape.head_dim)
            operand = hopper.unpack(queries)
            return hopper.pack(hopper.wgmma_e4m3(hopper.unpack(scores), operand, descriptor, i32(0)))

        return cast(Operation, issue)

    def gather(self) -> Operation:
        """``(output, weights, values) -> output``: issues the product with a block of values, which is left to run."""

        @plgpu.inline_mgpu(
            arg_types=(self.layout["output"], self.layout["weights"], plgpu.RefType(self.value_swizzle)),
            return_type=self.type["output"],
        )
        def issue(_: Any, output: Any, weights: Any, values: Any) -> Any:
            descriptor = hopper.k_major_descriptor(hopper.shared_address(values), self.shape.keys)
            operand = hopper.unpack(weights)
            return hopper.pack(hopper.wgmma_e4m3(hopper.unpack(output), operand, descriptor, i32(1)))

        return cast(Operation, issue)

    def wait(self, name: str, in_flight: int) -> Operation:
        """``(registers, queries, weights) -> registers`` once at most ``in_flight`` products run.

        wgmma reads its operand registers late, so those of running products are kept up to here.
        """

        @plgpu.inline_mgpu(
            arg_types=(self.layout[name], self.layout["queries"], self.layout["weights"]), return_type=self.type[name]
        )
        def wait(_: Any, registers: Any, queries: Any, weights: Any) -> Any:
            keep = [*hopper.unpack(queries), *hopper.unpack(weights)]
            return hopper.pack(hopper.wait_for_wgmma(in_flight, hopper.unpack(registers), keep))

        return cast(Operation, wait)

    def mask(self) -> Operation:
        """``(scores, limits, first key) -> scores``: hides keys behind each row's last one."""

        @plgpu.inline_mgpu(
            arg_types=(self.layout["scores"], self.layout["limits"], self.scalar), return_type=self.type["scores"]
        )
        def hide(_: Any, scores: Any, limits: Any, first: Any) -> Any:
            _row, t = self._row()
            column = arith.addi(first.registers.item(), arith.muli(t, i32(2)))
            last = [arith.subi(limit, column) for limit in hopper.unpack(limits)]
            hidden = []
            for i, score in enumerate(hopper.unpack(scores)):
                seen = arith.cmpi(arith.CmpIPredicate.sle, i32(i // 4 * 8 + i % 2), last[i % 4 // 2])
                hidden.append(arith.select(seen, score, f32(MASKED)))
            return hopper.pack(hidden)

        return cast(Operation, hide)

    def weigh_anew(self) -> Operation:
        """``(scores, factors, scales, sink) -> (weights, maxima)`` of a row's first block of keys."""

        @plgpu.inline_mgpu(
            arg_types=(self.layout["scores"], self.layout["factors"], self.layout["pair"], plgpu.RefType()),
            return_type=(self.type["weights"], self.type["pair"]),
        )
        def weigh(_: Any, scores: Any, factors: Any, scales: Any, sink: Any) -> Any:
            registers = hopper.unpack(scores)
            factors = self._in_scores(factors, scales)
            maxima = self._maxima(registers, factors, [f32(LOWEST)] * 2)
            words = self._weights(registers, factors, maxima)
            self._any_of(words, sink)
            return hopper.pack(words), hopper.pack(maxima)

        return cast(Operation, weigh)

    def weigh(self) -> Operation:
        """``(scores, factors, scales, maxima, sink) -> (weights, flag)``, by the maxima of the blocks before.

        That takes no look at this block's scores first. The flag is 0 in a warp none of whose weights is too large for
        e4m3; those of another one are to be corrected. ``sink`` is a word of shared memory.
        """

        @plgpu.inline_mgpu(
            arg_types=(
                self.layout["scores"], self.layout["factors"], *[self.layout["pair"]] * 2, plgpu.RefType(),
            ),
            return_type=(self.type["weights"], self.type["flag"]),
        )  # fmt: skip
        def weigh(_: Any, scores: Any, factors: Any, scales: Any, maxima: Any, sink: Any) -> Any:
            factors, maxima = self._in_scores(factors, scales), hopper.unpack(maxima)
            words = self._weights(hopper.unpack(scores), factors, maxima)
            # The largest e4m3, to which larger ones are rounded, is 0x7E; a byte that holds it gets its highest bit.
            large = self._any_of([arith.addi(word, i32(0x02020202)) for word in words], sink)
            [flag] = hopper.asm(
                "{ .reg .pred p; setp.ne.b32 p, $1, 0; vote.sync.any.pred p, p, 0xffffffff; selp.b32 $0, 1, 0, p; }",
                "=r,r", [arith.andi(large, i32(0x80808080))], [ir.IntegerType.get_signless(32)],
            )  # fmt: skip
            return hopper.pack(words), hopper.pack([flag])

        return cast(Operation, weigh)

    def correct(self) -> Operation:
        """``(scores, factors, scales, maxima, weights, flag) -> (weights, maxima, change)``.

        Where the flag is set, maxima follow the scores that are above them by more than ``SLACK``, and weights are
        those of the new maxima; ``change`` brings what was weighed by the old ones to them.
        """

        @plgpu.inline_mgpu(
            arg_types=(
                self.layout["scores"], self.layout["factors"], *[self.layout["pair"]] * 2, self.layout["weights"],
                self.layout["flag"],
            ),
            return_type=(self.type["weights"], *[self.type["pair"]] * 2),
        )  # fmt: skip
        def correct(_: Any, scores: Any, factors: Any, scales: Any, maxima: Any, weights: Any, flag: Any) -> Any:
            factors, maxima, weights = self._in_scores(factors, scales), hopper.unpack(maxima), hopper.unpack(weights)
            registers = hopper.unpack(scores)

            def anew() -> list[ir.Value]:
                peaks = self._maxima(registers, factors, maxima)
                change = [hopper.exp2(arith.subf(old, new)) for old, new in zip(maxima, peaks, strict=True)]
                return [*self._weights(registers, factors, peaks), *peaks, *change]

            [flag] = hopper.unpack(flag)
            set_ = arith.cmpi(arith.CmpIPredicate.ne, flag, i32(0))
            results = hopper.branch(set_, anew, [*weights, *maxima, f32(1), f32(1)])
            return hopper.pack(results[:-4]), hopper.pack(results[-4:-2]), hopper.pack(results[-2:])

        return cast(Operation, correct)

    def _any_of(self, words: Sequence[ir.Value], sink: ir.Value) -> ir.Value:
        """All bits of the words, which are there before the tensor core is waited for.

        ptxas would move behind that wait whatever is needed only there, and it is what must overlap. It does not move a
        store; what this one leaves in ``sink`` is of no use.
        """
        result = functools.reduce(arith.ori, words)
        hopper.asm("st.shared.b32 [$0], $1;", "r,r", [hopper.shared_address(sink), result], [])
        return result

    def _in_scores(self, factors: Any, scales: Any) -> list[ir.Value]:
        """What a block's scores are multiplied by, per row."""
        key_scale, _value_scale = hopper.unpack(scales)
        factors = [arith.mulf(factor, key_scale) for factor in hopper.unpack(factors)]
        if self.shape.cached:  # only then a row's first block may be hidden from it
            factors = [hopper.maximum(factor, f32(SMALLEST_FACTOR)) for factor in factors]
        return factors

    def _maxima(
        self, scores: Sequence[ir.Value], factors: Sequence[ir.Value], before: Sequence[ir.Value]
    ) -> list[ir.Value]:
        """Per row the maximum so far, or that of the scores if it is above by more than ``SLACK``."""
        peaks = []
        for half, (factor, peak) in enumerate(zip(factors, before, strict=True)):
            mine = [score for i, score in enumerate(scores) if i % 4 // 2 == half]
            # Three short chains rather than a long one.
            chains = mine[:3]
            for j, score in enumerate(mine[3:]):
                chains[j % 3] = hopper.maximum(chains[j % 3], score)
            largest = hopper.maximum(hopper.maximum(chains[0], chains[1]), chains[2])
            largest = arith.mulf(hopper.across_lanes(largest, hopper.maximum, 4), factor)
            above = arith.cmpf(arith.CmpFPredicate.OGT, largest, arith.addf(peak, f32(SLACK)))
            peaks.append(arith.select(above, largest, peak))
        return peaks

    def _weights(
        self, scores: Sequence[ir.Value], factors: Sequence[ir.Value], maxima: Sequence[ir.Value]
    ) -> list[ir.Value]:
        """``2^(score · factor - maximum + WEIGHT_EXPONENT)`` in e4m3, in the scores' order."""
        offsets = [arith.subf(f32(WEIGHT_EXPONENT), maximum) for maximum in maxima]
        weights = []
        for i, score in enumerate(scores):
            half = i % 4 // 2
            weights.append(hopper.exp2(hopper.multiply_add(score, factors[half], offsets[half])))
        return [hopper.to_e4m3x4(weights[i : i + 4]) for i in range(0, len(weights), 4)]

    def as_operand(self) -> Operation:
        """``weights -> weights``, from the scores' order to that of the second product's register operand.

        A thread's columns 2 t, 2 t + 1, 8 + 2 t and 9 + 2 t of each 16 become the operand's inputs 4 t to 4 t + 3:
        values lie in that order. A step of its own, behind the product before: ptxas serialises wgmmas when it finds
        the registers of an operand written while another runs.
        """

        @plgpu.inline_mgpu(arg_types=(self.layout["weights"],), return_type=self.type["weights"])
        def arrange(_: Any, weights: Any) -> Any:
            words, arranged = hopper.unpack(weights), []
            for i in range(0, len(words), 2):
                for selector in ("0x5410", "0x7632"):  # of both words' halves the lower ones, the upper ones
                    ptx = f"prmt.b32 $0, $1, $2, {selector};"
                    arranged.append(hopper.pure_asm(ptx, "=r,r,r", words[i : i + 2], words[i].type))
            return hopper.pack(arranged)

        return cast(Operation, arrange)

    def rescale(self) -> Operation:
        """``(output, held sums, since, scales before, scales, change, flag) -> (output, held sums, since)``.

        To the new maxima, where the flag is set, and to this block's scale of values if it is another than that of the
        block before; weights' sums, in the output's last columns and those that are held, to the maxima alone.
        ``since`` is the product of what the output was multiplied by since something was held.
        """

        @plgpu.inline_mgpu(
            arg_types=(self.layout["output"], *[self.layout["pair"]] * 5, self.layout["flag"]),
            return_type=(self.type["output"], *[self.type["pair"]] * 2),
        )
        def scale(_: Any, output: Any, sums: Any, since: Any, before: Any, now: Any, change: Any, flag: Any) -> Any:
            registers, change = hopper.unpack(output), hopper.unpack(change)
            sums, since = hopper.unpack(sums), hopper.unpack(since)
            values, [flag] = self.shape.head_dim // 2, hopper.unpack(flag)
            (_key_scale, value_before), (_next_key_scale, value_scale) = hopper.unpack(before), hopper.unpack(now)
            new_unit = arith.cmpf(arith.CmpFPredicate.UNE, value_before, value_scale)
            changes = arith.ori(new_unit, arith.cmpi(arith.CmpIPredicate.ne, flag, i32(0)))

            def multiply() -> list[ir.Value]:
                [of_unit] = hopper.divide_all([value_before], value_scale)
                shrink = [arith.mulf(c, of_unit) for c in change]
                scaled = [arith.mulf(r, shrink[i % 4 // 2]) for i, r in enumerate(registers[:values])]
                scaled += [arith.mulf(r, change[i % 4 // 2]) for i, r in enumerate(registers[values:])]
                scaled += [arith.mulf(a, b) for a, b in zip(sums, change, strict=True)]
                return scaled + [arith.mulf(a, b) for a, b in zip(since, shrink, strict=True)]

            scaled = hopper.branch(changes, multiply, [*registers, *sums, *since])
            return hopper.pack(scaled[:-4]), hopper.pack(scaled[-4:-2]), hopper.pack(scaled[-2:])

        return cast(Operation, scale)

    def hold(self) -> Operation:
        """``(output, held) -> ()``: each thread's registers, without sums, to its place in shared memory."""

        @plgpu.inline_mgpu(arg_types=(self.layout["output"], plgpu.RefType()), return_type=())
        def hold(_: Any, output: Any, held: Any) -> Any:
            registers = hopper.unpack(output)
            for i, place in self._held(held):
                hopper.asm(
                    f"st.shared.v4.f32 [$0+{place[1]}], {{$1, $2, $3, $4}};", "r,f,f,f,f",
                    [place[0], *registers[i : i + 4]], [],
                )  # fmt: skip
            return ()

        return cast(Operation, hold)

    def add_held(self) -> Operation:
        """``(output, factors, held) -> output``: plus what is held, each row times its factor."""

        @plgpu.inline_mgpu(
            arg_types=(self.layout["output"], self.layout["pair"], plgpu.RefType()), return_type=self.type["output"]
        )
        def add(_: Any, output: Any, factors: Any, held: Any) -> Any:
            registers, factors = hopper.unpack(output), hopper.unpack(factors)
            for i, place in self._held(held):
                for j, word in enumerate(hopper.load_shared_x4(*place)):
                    before = arith.bitcast(ir.F32Type.get(), word)
                    registers[i + j] = hopper.multiply_add(before, factors[(i + j) % 4 // 2], registers[i + j])
            return hopper.pack(registers)

        return cast(Operation, add)

    def _held(self, held: Any) -> list[tuple[int, tuple[ir.Value, int]]]:
        """The first of each four registers, and where they are held: an address and an offset."""
        base = hopper.shared_address(held)
        base = arith.addi(base, arith.muli(hopper.thread_in_warpgroup(), i32(16)))
        return [(i, (base, 4 * i * hopper.WARPGROUP)) for i in range(0, self.shape.head_dim // 2, 4)]

    def add_sums(self) -> Operation:
        """``(held sums, output) -> held sums``: plus the weights' sums in the output's last columns."""

        @plgpu.inline_mgpu(arg_types=(self.layout["pair"], self.layout["output"]), return_type=self.type["pair"])
        def add(_: Any, sums: Any, output: Any) -> Any:
            in_output = hopper.unpack(output)[self.shape.head_dim // 2 :]
            return hopper.pack([arith.addf(a, b) for a, b in zip(hopper.unpack(sums), in_output[::2], strict=True)])

        return cast(Operation, add)

    def fill_with_ones(self) -> Operation:
        """``rows in shared memory -> ()``: the ``SUM_COLUMNS`` rows behind a block of values, all 1 in e4m3."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(self.value_swizzle),), return_type=())
        def fill(_: Any, rows: Any) -> Any:
            place = arith.addi(hopper.shared_address(rows), arith.muli(hopper.thread_in_warpgroup(), i32(8)))
            ones = i32(0x38383838)
            hopper.asm("st.shared.v2.b32 [$0], {$1, $2};", "r,r,r", [place, ones, ones], [])
            return ()

        return cast(Operation, fill)

    def store(self) -> Operation:
        """``(output, sums, scales, tile in shared memory) -> ()``: times the values' scale, by the sums, in bf16.

        The tile is ``[head_dim / 64, 64, 64]`` in rows of 128 bytes with the 128-byte swizzle.
        """
        s = self.shape

        @plgpu.inline_mgpu(
            arg_types=(
                self.layout["output"], self.layout["pair"], self.layout["pair"], plgpu.RefType(self.output_swizzle),
            ),
            return_type=(),
        )  # fmt: skip
        def write(_: Any, output: Any, sums: Any, scales: Any, tile: Any) -> Any:
            scale = hopper.unpack(scales)[1]
            factors = [hopper.divide(scale, total) for total in hopper.unpack(sums)]
            values = hopper.unpack(output)[: s.head_dim // 2]
            registers = [arith.mulf(r, factors[i % 4 // 2]) for i, r in enumerate(values)]
            words = [hopper.to_bf16x2(registers[i], registers[i + 1]) for i in range(0, len(registers), 2)]
            row, second = self._matrix_row()
            base = arith.addi(hopper.shared_address(tile), arith.muli(row, i32(128)))
            for block in range(0, s.head_dim // 8, 2):
                chunk = arith.xori(arith.addi(second, i32(block % 8)), arith.andi(row, i32(7)))
                place = arith.addi(base, arith.addi(arith.muli(chunk, i32(16)), i32(block // 8 * ROWS * 128)))
                hopper.store_matrices(place, words[2 * block : 2 * block + 4], transposed=False)
            return ()

        return cast(Operation, write)
