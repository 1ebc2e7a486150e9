"""The register-level steps of the Hopper matmul, which :mod:`pallas_kernels.mosaic_matmul` puts in order."""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import arithmetic, hopper, tensor_core
from pallas_kernels.hopper import f32, i32
from pallas_kernels.reference import E4M3_MAX
from pallas_kernels.tiling import Tiling
from pallas_kernels.weight_layout import CODE_WORDS, SHARE_N, SHARES, TILE_K, share_bytes
from pallas_kernels.weight_steps import CODE_UNIT, decode_codes, fold_codes, load_scales, load_short_scales

Operation = Callable[..., Any]

FLOAT16_MAX = 65504.0


def sums_unit(k: int) -> float:
    """The power of two in units of which float16 sums over k inputs with e4m3 scales pass that type's range for none.

    ``k · 448 · 8 CODE_UNIT · 448`` is the largest sum there is; a thirtieth of the range is left for roundings.
    """
    largest = k * E4M3_MAX * 8 * CODE_UNIT * E4M3_MAX
    return 2.0 ** max(0, math.ceil(math.log2(1.03 * largest / FLOAT16_MAX)))


def by_row(registers: list[ir.Value], pair: list[ir.Value]) -> list[ir.Value]:
    """Accumulator registers times the factors of the two outputs that a thread has."""
    return [arith.mulf(register, pair[i % 4 // 2]) for i, register in enumerate(registers)]


def load_if(address: ir.Value, condition: ir.Value) -> ir.Value:
    """A float32 of global memory, or 0 where the condition does not hold."""
    flag = arith.extui(ir.IntegerType.get_signless(32), condition)
    load = "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.f32 $0, 0f00000000; @p ld.global.nc.f32 $0, [$1]; }"
    return hopper.asm(load, "=&f,l,r", [address, flag], [ir.F32Type.get()])[0]


def float_address(ref: ir.Value, index: ir.Value) -> ir.Value:
    """The address of an element of a float32 vector in global memory."""
    i64 = ir.IntegerType.get_signless(64)
    start = llvm.ptrtoint(i64, utils.memref_ptr(ref))
    return arith.addi(start, arith.extui(i64, arith.muli(index, i32(4))))


class Steps:
    """The register-level steps of one product, as functions that a Pallas kernel calls.

    Sums are ``short`` where group scales are e4m3 and exact: a group's product is float16 as the tensor core gives it,
    and is added in float16, times its scale. Otherwise they are the tensor core's float32 accumulators, multiplied
    by a ratio wherever a group with another scale begins.

    Args:
      m: tokens of the product.
      sizes: outputs of each weight.
      k: inputs.
      group_size: inputs that share a scale.
      scale_dtype: of these scales.
      tiling: how the product is cut.
      scaled_tokens: tokens whose scales a container of factors has, where those are more than the tile's.
      folded: whether weights are rounded to e4m3 with their group's scale, so that sums have no units.
    """

    def __init__(
        self, m: int, sizes: Sequence[int], k: int, group_size: int, scale_dtype: Any, tiling: Tiling,
        scaled_tokens: int | None = None, folded: bool = False,
    ) -> None:  # fmt: skip
        self.folded = folded
        self.short = not folded and scale_dtype == jnp.float8_e4m3fn
        self.unit = sums_unit(k) if self.short else 1.0
        self.m, self.sizes, self.tiling = m, tuple(sizes), tiling
        self.group_size, self.scale_dtype = group_size, scale_dtype
        self.groups = TILE_K // group_size
        self.half = tiling.tokens // tiling.halves
        # Of a thread's sums of a half: the containers that these are in, and how many registers.
        self.kind, self.registers = ("short", self.half // 4) if self.short else ("accumulator", self.half // 2)
        self.share_bytes = share_bytes(group_size, scale_dtype)
        self.tile_bytes = SHARES * self.share_bytes
        self.swizzle = (cast(Any, plgpu.SwizzleTransform)(128),)
        self.scalar = plgpu.Layout.WG_SPLAT(())
        containers = {
            "accumulator": (self.half // 2, jnp.float32),
            "short": (self.half // 4, jnp.int32),
            "operand": (16, jnp.int32),
            "ratios": (2 * self.groups, jnp.int32 if self.short else jnp.float32),
            "pair": (2, jnp.float32),
            "factors": (-(-(scaled_tokens or tiling.tokens) // 32), jnp.float32),
        }
        self.layout = {name: hopper.container_layout(count) for name, (count, _) in containers.items()}
        self.type = {name: hopper.container_type(count, dtype) for name, (count, dtype) in containers.items()}

    def load_weights(self) -> Operation:
        """``(stage, tile, scales before) -> (operand, ratios, first scales, last scales)``.

        The ratios bring a sum in units of one group's scale to those of the next, for each group of the step; of short
        sums they are the groups' scales, and the other scales remain those before; folded, all of them are 1.
        """

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), self.scalar, self.layout["pair"]),
            return_type=(self.type["operand"], self.type["ratios"], self.type["pair"], self.type["pair"]),
        )
        def load(_: Any, stage: Any, tile: Any, before: Any) -> Any:
            thread = hopper.thread_in_warpgroup()
            lane, warp = arith.andi(thread, i32(31)), arith.shrui(thread, i32(5))
            share = arith.addi(arith.muli(tile.registers.item(), i32(SHARES)), warp)
            share = arith.addi(hopper.shared_address(stage), arith.muli(share, i32(self.share_bytes)))
            address = arith.addi(share, arith.muli(lane, i32(16)))
            words = hopper.load_shared(address) + hopper.load_shared(address, 512)
            size = jnp.dtype(self.scale_dtype).itemsize
            address = arith.addi(share, arith.muli(arith.shrui(lane, i32(2)), i32(2 * size)))
            places = [arith.addi(address, i32(4 * CODE_WORDS + g * SHARE_N * size)) for g in range(self.groups)]
            if self.short:
                ratios = [scale for place in places for scale in load_short_scales(place, self.unit)]
                return hopper.pack(decode_codes(words)), hopper.pack(ratios), before, before
            scales = [load_scales(place, self.scale_dtype) for place in places]
            if self.folded:
                each, ones = 8 // self.groups, [f32(1)] * 2
                operand = [
                    r for g, pair in enumerate(scales) for r in fold_codes(words[g * each : (g + 1) * each], pair)
                ]
                return tuple(map(hopper.pack, (operand, ones * self.groups, ones, ones)))
            ratio = "{ .reg .f32 r; rcp.approx.ftz.f32 r, $2; mul.f32 $0, $1, r; }"
            ratios = [
                hopper.pure_asm(ratio, "=f,f,f", [old, new], old.type)
                for last, here in zip([hopper.unpack(before), *scales], scales, strict=False)
                for old, new in zip(last, here, strict=True)
            ]
            return tuple(map(hopper.pack, (decode_codes(words), ratios, scales[0], scales[-1])))

        return cast(Operation, load)

    def settle(self, in_flight: int, group: int, kept: int) -> Operation:
        """``(accumulator, ratios, operands...) -> accumulator``: its wgmma is done, and it is in the group's units.

        wgmma reads its operand registers late, so those still in use are kept until the wait.
        """

        @plgpu.inline_mgpu(
            arg_types=(self.layout["accumulator"], self.layout["ratios"], *[self.layout["operand"]] * kept),
            return_type=self.type["accumulator"],
        )
        def wait(_: Any, accumulator: Any, ratios: Any, *operands: Any) -> Any:
            keep = [register for operand in operands for register in hopper.unpack(operand)]
            registers = tensor_core.wait_for_wgmma(in_flight, hopper.unpack(accumulator), keep)
            if self.folded:
                return hopper.pack(registers)
            return hopper.pack(by_row(registers, hopper.unpack(ratios)[2 * group : 2 * group + 2]))

        return cast(Operation, wait)

    def add(self, in_flight: int, group: int, kept: int) -> Operation:
        """``(short sums, short products, ratios, operands...) -> sums, products``: adds a group's, which are done.

        Operands are kept as in :meth:`settle`.
        """

        @plgpu.inline_mgpu(
            arg_types=(
                self.layout["short"], self.layout["short"], self.layout["ratios"], *[self.layout["operand"]] * kept,
            ),
            return_type=(self.type["short"], self.type["short"]),
        )  # fmt: skip
        def wait(_: Any, sums: Any, products: Any, ratios: Any, *operands: Any) -> Any:
            keep = [register for operand in operands for register in hopper.unpack(operand)]
            registers = tensor_core.wait_for_wgmma(in_flight, hopper.unpack(products), keep)
            pair = hopper.unpack(ratios)[2 * group : 2 * group + 2]
            totals = [
                arithmetic.f16x2("fma.rn", register, pair[i % 2], total)
                for i, (register, total) in enumerate(zip(registers, hopper.unpack(sums), strict=True))
            ]
            return hopper.pack(totals), hopper.pack(registers)

        return cast(Operation, wait)

    def multiply_alone(self, half: int, group: int) -> Operation:
        """``(products before, operand, tokens) -> short products``: a group's, which are left to run.

        They take the registers of those before; without these the compiler keeps new ones for each.
        """

        @plgpu.inline_mgpu(
            arg_types=(self.layout["short"], self.layout["operand"], plgpu.RefType(self.swizzle)),
            return_type=self.type["short"],
        )
        def issue(_: Any, before: Any, operand: Any, tokens: Any) -> Any:
            its = self._of_group(half, group, operand, tokens)
            return hopper.pack(tensor_core.wgmma_e4m3(hopper.unpack(before), *its, i32(0)))

        return cast(Operation, issue)

    def in_common_units(self, sums: Any, scales: Any) -> list[ir.Value]:
        """The registers of sums, in units that those of all blocks have."""
        registers: list[ir.Value] = hopper.unpack(sums)
        return registers if self.short else by_row(registers, hopper.unpack(scales))

    def to_send(self, sums: Any, scales: Any) -> list[ir.Value]:
        """As :meth:`in_common_units`, in registers of their own.

        Those that an instruction stores together must be neighbours; where the sums themselves had to be, the loop that
        makes them would take up to ten registers more. So -0 is added.
        """
        registers = self.in_common_units(sums, scales)
        if not self.short:
            return registers
        return [arithmetic.f16x2("add.rn", register, i32(0x80008000)) for register in registers]

    def add_sums(self, a: Sequence[ir.Value], b: Sequence[ir.Value]) -> list[ir.Value]:
        """Registers of sums in common units, added up."""
        if self.short:
            return [arithmetic.f16x2("add.rn", *pair) for pair in zip(a, b, strict=True)]
        return list(map(arith.addf, a, b))

    def _of_group(self, half: int, group: int, operand: Any, tokens: Any) -> tuple[list[ir.Value], ir.Value]:
        """The tensor core's operands of a group: registers of the weight, and where the tokens are."""
        per_group = 16 // self.groups
        registers = hopper.unpack(operand)[group * per_group : (group + 1) * per_group]
        start = half * self.half * TILE_K + group * self.group_size
        return registers, tensor_core.k_major_descriptor(arith.addi(hopper.shared_address(tokens), i32(start)))

    def multiply(self, half: int, group: int) -> Operation:
        """``(accumulator, operand, tokens, is first) -> accumulator``: adds a group's product, which is left to run."""

        @plgpu.inline_mgpu(
            arg_types=(
                self.layout["accumulator"], self.layout["operand"], plgpu.RefType(self.swizzle), self.scalar,
            ),
            return_type=self.type["accumulator"],
        )  # fmt: skip
        def issue(_: Any, accumulator: Any, operand: Any, tokens: Any, first: Any) -> Any:
            accumulate = i32(1)
            if group == 0:
                later = arith.cmpi(arith.CmpIPredicate.eq, first.registers.item(), i32(0))
                accumulate = arith.extui(ir.IntegerType.get_signless(32), later)
            its = self._of_group(half, group, operand, tokens)
            return hopper.pack(tensor_core.wgmma_e4m3(hopper.unpack(accumulator), *its, accumulate))

        return cast(Operation, issue)

    def load_factors(self) -> Operation:
        """``(weight, first token, token scales, *tensor scales) -> factors``: lane l has tokens l, l + 32, ..."""

        @plgpu.inline_mgpu(
            arg_types=(self.scalar, self.scalar, plgpu.RefType(), *[plgpu.RefType()] * len(self.sizes)),
            return_type=self.type["factors"],
        )
        def load(_: Any, weight: Any, start: Any, token_scales: Any, *tensor_scales: Any) -> Any:
            lane = arith.andi(hopper.thread_in_warpgroup(), i32(31))
            always = hopper.constant(1, bits=1)
            scale = load_if(self._of_weight(weight, [float_address(ref, i32(0)) for ref in tensor_scales]), always)
            if not self.folded:
                scale = arith.mulf(scale, f32(self.unit / CODE_UNIT))
            factors = []
            for i in range(-(-self.tiling.tokens // 32)):
                token = arith.addi(arith.addi(lane, i32(32 * i)), start.registers.item())
                exists = arith.cmpi(arith.CmpIPredicate.slt, token, i32(self.m))
                factors.append(arith.mulf(load_if(float_address(token_scales, token), exists), scale))
            return hopper.pack(factors)

        return cast(Operation, load)

    def _of_weight(self, weight: Any, values: Sequence[ir.Value]) -> ir.Value:
        """Of a value per weight, that of the weight with a number that only the device knows."""
        picked = values[0]
        for i, value in enumerate(values[1:], start=1):
            here = arith.cmpi(arith.CmpIPredicate.eq, weight.registers.item(), i32(i))
            picked = arith.select(here, value, picked)
        return picked

    def load_bias(self) -> Operation:
        """``(weight, first output, *biases) -> pair``: the bias of a thread's two outputs."""

        @plgpu.inline_mgpu(
            arg_types=(self.scalar, self.scalar, *[plgpu.RefType()] * len(self.sizes)), return_type=self.type["pair"]
        )
        def load(_: Any, weight: Any, start: Any, *biases: Any) -> Any:
            row = arith.addi(self._output(), start.registers.item())
            pair, outputs = [], self._of_weight(weight, [i32(n) for n in self.sizes])
            for offset in (0, 8):
                output = arith.addi(row, i32(offset))
                exists = arith.cmpi(arith.CmpIPredicate.slt, output, outputs)
                pair.append(load_if(self._of_weight(weight, [float_address(ref, output) for ref in biases]), exists))
            return hopper.pack(pair)

        return cast(Operation, load)

    def store(self, half: int, has_bias: bool, has_residual: bool) -> Operation:
        """``(sums, scales, factors, y in shared memory[, bias]) -> ()``: a half's results, in bf16.

        They replace the residual that they are added to, if there is one.
        """

        @plgpu.inline_mgpu(
            arg_types=(
                self.layout[self.kind], self.layout["pair"], self.layout["factors"], plgpu.RefType(self.swizzle),
                *[self.layout["pair"]] * has_bias,
            ),
            return_type=(),
        )  # fmt: skip
        def write(_: Any, sums: Any, scales: Any, factors: Any, y: Any, *bias: Any) -> Any:
            thread = hopper.thread_in_warpgroup()
            lane, warp = arith.andi(thread, i32(31)), arith.shrui(thread, i32(5))
            # Where the lane's row of eight outputs goes, in a matrix of 128-byte rows with the 128-byte swizzle.
            token = arith.addi(arith.andi(lane, i32(7)), arith.muli(arith.shrui(lane, i32(4)), i32(8)))
            chunk = arith.addi(arith.muli(warp, i32(2)), arith.andi(arith.shrui(lane, i32(3)), i32(1)))
            chunk = arith.xori(chunk, arith.andi(lane, i32(7)))
            address = arith.addi(arith.muli(token, i32(128)), arith.muli(chunk, i32(16)))
            address = arith.addi(hopper.shared_address(y), address)
            results = self._results(half, sums, scales, factors, *bias)
            packed = [arithmetic.to_bf16x2(*results[i : i + 2]) for i in range(0, len(results), 2)]
            for j in range(0, self.half // 8, 2):
                offset = (half * self.half + 8 * j) * 128
                place, results = arith.addi(address, i32(offset)), packed[2 * j : 2 * j + 4]
                if has_residual:
                    added = tensor_core.load_matrices(place, 4, transposed=True)
                    results = [
                        hopper.pure_asm("add.rn.bf16x2 $0, $1, $2;", "=r,r,r", list(pair), pair[0].type)
                        for pair in zip(added, results, strict=True)
                    ]
                tensor_core.store_matrices(place, results, transposed=True)
            return ()

        return cast(Operation, write)

    def _results(self, half: int, sums: Any, scales: Any, factors: Any, bias: Any | None = None) -> list[ir.Value]:
        """A half's results: per 8 tokens, of which a thread has two neighbours, of its first output and its second."""
        registers = self.in_common_units(sums, scales)
        if self.short:
            registers = [single for pair in registers for single in arithmetic.of_f16x2(pair)]
        factors, results = hopper.unpack(factors), []
        column = arith.muli(arith.andi(hopper.thread_in_warpgroup(), i32(3)), i32(2))
        for j in range(self.half // 8):
            first = half * self.half + 8 * j
            pair = [hopper.shuffle(factors[first // 32], arith.addi(column, i32(first % 32 + c))) for c in range(2)]
            results += [arith.mulf(r, s) for r, s in zip(registers[4 * j : 4 * j + 4], 2 * pair, strict=True)]
        if bias is not None:
            offsets = hopper.unpack(bias)
            results = [arith.addf(r, offsets[i % 4 // 2]) for i, r in enumerate(results)]
        return results

    def store_float32(self, half: int, has_bias: bool, outputs: int) -> Operation:
        """``(sums, scales, factors, first token, first output, y[, bias]) -> ()``: a half's results, in float32.

        They go to global memory at once, eight neighbouring outputs of a token from eight lanes.
        """

        @plgpu.inline_mgpu(
            arg_types=(
                self.layout[self.kind], self.layout["pair"], self.layout["factors"], self.scalar, self.scalar,
                plgpu.RefType(), *[self.layout["pair"]] * has_bias,
            ),
            return_type=(),
        )  # fmt: skip
        def write(_: Any, sums: Any, scales: Any, factors: Any, tokens: Any, start: Any, y: Any, *bias: Any) -> Any:
            lane = arith.andi(hopper.thread_in_warpgroup(), i32(31))
            output = arith.addi(start.registers.item(), self._output())
            token = arith.addi(tokens.registers.item(), arith.muli(arith.andi(lane, i32(3)), i32(2)))
            below = arith.CmpIPredicate.slt
            for i, result in enumerate(self._results(half, sums, scales, factors, *bias)):
                its_token = arith.addi(token, i32(i // 4 * 8 + i % 2))
                its_output = arith.addi(output, i32(i % 4 // 2 * 8))
                exists = arith.andi(
                    arith.cmpi(below, its_token, i32(self.m)), arith.cmpi(below, its_output, i32(outputs))
                )
                place = hopper.global_address(y, 4, (its_token, outputs), (its_output, 1))
                hopper.store_global(place, [result], condition=exists)
            return ()

        return cast(Operation, write)

    def _output(self) -> ir.Value:
        """The first of a thread's two outputs in its warpgroup's tile; the second one is 8 behind it."""
        thread = hopper.thread_in_warpgroup()
        warp, row = arith.shrui(thread, i32(5)), arith.andi(arith.shrui(thread, i32(2)), i32(7))
        return arith.addi(arith.muli(warp, i32(16)), row)
