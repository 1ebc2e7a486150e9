"""The register-level steps of prefill attention, which :mod:`pallas_kernels.mosaic_prefill` puts in order."""

import dataclasses
import math
from typing import Any, cast

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import arithmetic, hopper, tensor_core
from pallas_kernels.hopper import f32, i32
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.reference_rotation import SCALE_TOKENS
from pallas_kernels.weighing_steps import WEIGHING, held_factors, new_offsets, to_weights

ROWS = 64  # query rows of a warpgroup
LOG2_E = math.log2(math.e)
# A row's offset before it has seen anything: more than any score takes away.
NOTHING_SEEN = 60000.0
HIDDEN = 0xFC00FC00  # twice minus infinity in float16: hidden keys' scores


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
            "factors": (2, jnp.float32),
            "limits": (2, jnp.int32),
            "scores": (n // 4, jnp.int32),
            "weights": (n // 8, jnp.int32),
            "output": (d // 2, jnp.float32),
            "pair": (2, jnp.float32),
            "flag": (1, jnp.int32),
        }
        self.dtype = {name: dtype for name, (_count, dtype) in containers.items()}
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
        """``zeros -> offsets`` of rows that have seen nothing."""

        @plgpu.inline_mgpu(arg_types=(self.layout["pair"],), return_type=self.type["pair"])
        def begin(_: Any, zeros: Any) -> Any:
            return hopper.pack([f32(NOTHING_SEEN)] * len(hopper.unpack(zeros)))

        return cast(Operation, begin)

    def score(self) -> Operation:
        """``(scores, queries, keys) -> scores``: issues the product of two tiles in shared memory, left to run."""
        d = self.shape.head_dim

        @plgpu.inline_mgpu(
            arg_types=(self.layout["scores"], plgpu.RefType(self.key_swizzle), plgpu.RefType(self.key_swizzle)),
            return_type=self.type["scores"],
        )
        def issue(_: Any, scores: Any, queries: Any, keys: Any) -> Any:
            a, b = (tensor_core.k_major_descriptor(hopper.shared_address(x), d) for x in (queries, keys))
            return hopper.pack(tensor_core.wgmma_e4m3(hopper.unpack(scores), a, b, i32(0), d // 32))

        return cast(Operation, issue)

    def gather(self) -> Operation:
        """``(output, weights, values) -> output``: issues the product with a block of values, which is left to run."""

        @plgpu.inline_mgpu(
            arg_types=(self.layout["output"], self.layout["weights"], plgpu.RefType(self.value_swizzle)),
            return_type=self.type["output"],
        )
        def issue(_: Any, output: Any, weights: Any, values: Any) -> Any:
            descriptor = tensor_core.k_major_descriptor(hopper.shared_address(values), self.shape.keys)
            operand = hopper.unpack(weights)
            return hopper.pack(tensor_core.wgmma_e4m3(hopper.unpack(output), operand, descriptor, i32(1)))

        return cast(Operation, issue)

    def wait(self) -> Operation:
        """``(scores, output, weights) -> (scores, output)``, once no product runs.

        wgmma reads its operand registers late, so those of running products are kept up to here.
        """

        @plgpu.inline_mgpu(
            arg_types=(self.layout["scores"], self.layout["output"], self.layout["weights"]),
            return_type=(self.type["scores"], self.type["output"]),
        )
        def wait(_: Any, scores: Any, output: Any, weights: Any) -> Any:
            scores, output = hopper.unpack(scores), hopper.unpack(output)
            both = tensor_core.wait_for_wgmma(0, [*scores, *output], hopper.unpack(weights))
            return hopper.pack(both[: len(scores)]), hopper.pack(both[len(scores) :])

        return cast(Operation, wait)

    def mask(self) -> Operation:
        """``(scores, limits, first key) -> scores``: hides keys behind each row's last one."""

        @plgpu.inline_mgpu(
            arg_types=(self.layout["scores"], self.layout["limits"], self.scalar), return_type=self.type["scores"]
        )
        def hide(_: Any, scores: Any, limits: Any, first: Any) -> Any:
            _row, t = self._row()
            column = arith.addi(first.registers.item(), arith.muli(t, i32(2)))
            # Of all that begins with the thread's first pair: bits that are seen.
            seen = [
                arith.muli(arith.addi(arith.subi(limit, column), i32(1)), i32(16)) for limit in hopper.unpack(limits)
            ]
            hidden = []
            for i, pair in enumerate(hopper.unpack(scores)):
                ptx = (
                    f"{{ .reg .b32 bits, mask; add.s32 bits, $2, {-16 * 8 * (i // 2)}; max.s32 bits, bits, 0; "
                    f"shl.b32 mask, 0xFFFFFFFF, bits; lop3.b32 $0, $1, {HIDDEN:#x}, mask, 0xD8; }}"
                )
                hidden.append(hopper.pure_asm(ptx, "=r,r,r", [pair, seen[i % 2]], pair.type))
            return hopper.pack(hidden)

        return cast(Operation, hide)

    def weigh(self) -> Operation:
        """``(scores, factors, scales before, scales, offsets, sums, scratch)``: a block's weights.

        Gives ``(weights, offsets, sums, shrink, flag)``. A weight is two to the power of its score times the row's
        factor, plus the row's offset: 8 minus the maximum. That is done in float16; weights come out in e4m3, in the
        scores' order. Scales are those of the keys and values of the block before and of this one. ``shrink`` brings
        the output so far to the new offsets and to this block's scale of values; it is 1 in all of a warp's rows where
        ``flag`` is 0. A row's maximum is that of its scores up to ``SLACK``: it follows only a score further above.
        ``scratch`` is any shared memory; it stays as it is.
        """

        @plgpu.inline_mgpu(
            arg_types=(
                self.layout["scores"],
                self.layout["factors"],
                *[self.layout["pair"]] * 4,
                plgpu.RefType(self.output_swizzle),
            ),
            return_type=(self.type["weights"], *[self.type["pair"]] * 3, self.type["flag"]),
        )
        def weigh(
            _: Any, scores: Any, factors: Any, before: Any, now: Any, offsets: Any, sums: Any, scratch: Any
        ) -> Any:
            scores, old, sums = hopper.unpack(scores), hopper.unpack(offsets), hopper.unpack(sums)
            (_key_scale, value_before), (key_scale, value_scale) = hopper.unpack(before), hopper.unpack(now)
            factors = held_factors(arith.mulf(factor, key_scale) for factor in hopper.unpack(factors))
            new_pair = new_offsets(scores, factors, old)
            new = arithmetic.of_f16x2(new_pair)
            weights, totals = to_weights(scores, factors, new_pair, WEIGHING[self.shape.head_dim])
            # Exact of powers of two, as scales are.
            change_of_unit = arith.mulf(value_before, arithmetic.approximate_reciprocal(value_scale))
            shrink, grown = [], []
            for half in range(2):
                change = arithmetic.exp2(arith.subf(new[half], old[half]))
                shrink.append(arith.mulf(change, change_of_unit))
                grown.append(arithmetic.multiply_add(sums[half], change, totals[half]))
                # ptxas would move all of this behind the next wait for the tensor core, which is what it must overlap.
                # It does not move a store there, and this one is never made: no sum is that large.
                hopper.asm(
                    "{ .reg .pred p; setp.gt.f32 p, $1, 0f7F000000; @p st.shared.f32 [$0], $1; }", "r,f",
                    [hopper.shared_address(scratch), grown[half]], [],
                )  # fmt: skip
            flag = hopper.asm(
                "{ .reg .pred p, q; setp.neu.f32 p, $1, 0f3F800000; setp.neu.f32 q, $2, 0f3F800000; or.pred p, p, q; "
                "vote.sync.any.pred q, p, 0xffffffff; selp.b32 $0, 1, 0, q; }", "=r,f,f",
                shrink, [ir.IntegerType.get_signless(32)],
            )  # fmt: skip
            return tuple(map(hopper.pack, (weights, new, grown, shrink, flag)))

        return cast(Operation, weigh)

    def as_operand(self) -> Operation:
        """``weights -> weights``, from the scores' order to that of the second product's register operand.

        A thread's columns 2 t, 2 t + 1, 8 + 2 t and 9 + 2 t of each 16 become the operand's inputs 4 t to 4 t + 3:
        values lie in that order. A step of its own, behind the product before: ptxas serialises wgmmas when it finds
        the registers of an operand written while another runs.
        """

        @plgpu.inline_mgpu(arg_types=(self.layout["weights"],), return_type=self.type["weights"])
        def arrange(_: Any, weights: Any) -> Any:
            words = hopper.unpack(weights)
            pairs = [words[i : i + 2] for i in range(0, len(words), 2)]  # of 16 columns; both rows in a word
            return hopper.pack([arithmetic.permute(a, b, selector) for a, b in pairs for selector in (0x5410, 0x7632)])

        return cast(Operation, arrange)

    def shrink(self) -> Operation:
        """``(output, shrink, flag) -> output``: a thread's rows, each times its factor, unless the flag is 0."""

        @plgpu.inline_mgpu(
            arg_types=(self.layout["output"], self.layout["pair"], self.layout["flag"]),
            return_type=self.type["output"],
        )
        def scale(_: Any, output: Any, factors: Any, flag: Any) -> Any:
            registers, n = hopper.unpack(output), self.shape.head_dim // 2
            lines = ["{ .reg .pred p;", f"setp.ne.b32 p, ${2 * n + 2}, 0;", "@!p bra skip;"]
            lines += [f"@p mul.f32 ${i}, ${i}, ${2 * n + i % 4 // 2};" for i in range(n)]
            lines += ["skip: }"]
            constraints = ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f", "f", "r"])
            operands = [*registers, *hopper.unpack(factors), *hopper.unpack(flag)]
            return hopper.pack(hopper.asm("\n".join(lines), constraints, operands, [ir.F32Type.get()] * n))

        return cast(Operation, scale)

    def hold(self) -> Operation:
        """``(output, held) -> ()``: each thread's registers to its place in shared memory."""

        @plgpu.inline_mgpu(arg_types=(self.layout["output"], plgpu.RefType()), return_type=())
        def hold(_: Any, output: Any, held: Any) -> Any:
            registers = hopper.unpack(output)
            for i, place in self._held(held):
                hopper.store_shared(place[0], registers[i : i + 4], place[1])
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
                for j, word in enumerate(hopper.load_shared(*place)):
                    before = arith.bitcast(ir.F32Type.get(), word)
                    registers[i + j] = arithmetic.multiply_add(before, factors[(i + j) % 4 // 2], registers[i + j])
            return hopper.pack(registers)

        return cast(Operation, add)

    def _held(self, held: Any) -> list[tuple[int, tuple[ir.Value, int]]]:
        """The first of each four registers, and where they are held: an address and an offset."""
        base = hopper.shared_address(held)
        base = arith.addi(base, arith.muli(hopper.thread_in_warpgroup(), i32(16)))
        return [(i, (base, 4 * i * hopper.WARPGROUP)) for i in range(0, self.shape.head_dim // 2, 4)]

    def grow(self) -> Operation:
        """``(factors, shrink) -> factors``: their products."""

        @plgpu.inline_mgpu(arg_types=(self.layout["pair"], self.layout["pair"]), return_type=self.type["pair"])
        def multiply(_: Any, factors: Any, shrink: Any) -> Any:
            pairs = zip(hopper.unpack(factors), hopper.unpack(shrink), strict=True)
            return hopper.pack([arith.mulf(a, b) for a, b in pairs])

        return cast(Operation, multiply)

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
            factors = []
            for total in hopper.unpack(sums):
                # The four lanes of a row each summed their own columns.
                factors.append(arithmetic.divide(scale, hopper.across_lanes(total, arith.addf, 4)))
            registers = [arith.mulf(r, factors[i % 4 // 2]) for i, r in enumerate(hopper.unpack(output))]
            words = [arithmetic.to_bf16x2(registers[i], registers[i + 1]) for i in range(0, len(registers), 2)]
            row, second = self._matrix_row()
            base = arith.addi(hopper.shared_address(tile), arith.muli(row, i32(128)))
            for block in range(0, s.head_dim // 8, 2):
                chunk = arith.xori(arith.addi(second, i32(block % 8)), arith.andi(row, i32(7)))
                place = arith.addi(base, arith.addi(arith.muli(chunk, i32(16)), i32(block // 8 * ROWS * 128)))
                tensor_core.store_matrices(place, words[2 * block : 2 * block + 4], transposed=False)
            return ()

        return cast(Operation, write)
