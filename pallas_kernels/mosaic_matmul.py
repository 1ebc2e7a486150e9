"""The INT4 x FP8 matrix product for Hopper, in Pallas:Mosaic GPU.

The kernel computes tiles of yᵀ: weights are the first operand of the tensor core instruction, converted from int4 to
e4m3 in registers, and activations the second, read from shared memory. So it serves one token and many thousands.
``docs/kernels.md`` says what was tried and measured.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import hopper
from pallas_kernels.hopper import f32, i32
from pallas_kernels.weight_layout import CODE_WORDS, TILE_K, TILE_N, tile_shape

Operation = Callable[..., Any]

# What a code of 1 is worth when its bits are read as e4m3: sign and magnitude are a subnormal number.
CODE_UNIT = 2.0**-9
WARPGROUPS = 2  # that compute; a third one copies
BLOCK_N = WARPGROUPS * TILE_N
SHARED_MEMORY = 232448
STREAMING_MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the product is cut into pieces.

    Attributes:
      tokens: tokens of a block's tile, beside its 128 outputs; 8 to 256.
      stages: steps of 128 inputs that shared memory holds.
      halves: 1 or 2 parts of the tokens with accumulators of their own: with two, the tensor core works on one while
        the other's accumulator is brought to the next group's scale.
      unroll: steps whose tensor core instructions overlap; at least 2.
      snake: token tiles that neighbouring blocks work on, for the L2 cache.
      split: blocks that share the inputs of a tile and add up in the first one's shared memory.
      share: blocks, 1 or 2, that take the same tokens and copy them once.
      persistent: a block per multiprocessor that works through many tiles, instead of a block per tile.
    """

    tokens: int
    stages: int
    halves: int = 2
    unroll: int = 4
    snake: int = 8
    split: int = 1
    share: int = 1
    persistent: bool = True

    def shared_memory(self, tile_bytes: int) -> int:
        """Bytes of shared memory for a weight of such tiles, rounded up array by array as the compiler does."""
        arrays = [
            self.stages * self.tokens * TILE_K,
            self.stages * WARPGROUPS * tile_bytes,
            self.tokens * BLOCK_N * 2,
            (self.split - 1) * self.tokens * BLOCK_N * 4,
            2 * self.stages * 8,
        ]
        return sum(-(-size // 1024) * 1024 for size in arrays)


def choose_tiling(m: int, n: int, k: int, tile_bytes: int) -> Tiling:
    """A tiling for ``[m, k] x [n, k]``, by rules that follow from measurements on an H100."""
    blocks, steps = -(-n // BLOCK_N), -(-k // TILE_K)
    if m <= 64:
        tokens = next(t for t in (8, 16, 32, 64) if t >= m)
        # Larger clusters than four wait for neighbouring multiprocessors to be free together.
        split = next(s for s in (1, 2, 4) if s == 4 or blocks * s >= 96)
        while split > 1 and steps < 2 * split:
            split //= 2
        tiling = Tiling(tokens, 8, halves=1, unroll=2, split=split, persistent=False)
    elif m <= 512 and blocks * -(-m // 256) < 96:
        split = 2 if steps >= 16 and blocks * -(-m // 128) < 96 else 1
        tiling = Tiling(128, 5 if split == 2 else 6, split=split)
    else:
        tiling = Tiling(256, 4, share=2 if blocks > 1 and m > 256 else 1)
    while tiling.shared_memory(tile_bytes) > SHARED_MEMORY and tiling.stages > 2:
        tiling = dataclasses.replace(tiling, stages=tiling.stages - 1)
    return tiling


def decode_codes(words: list[ir.Value]) -> list[ir.Value]:
    """Words of 8 codes as e4m3 operand registers of 4, worth ``CODE_UNIT`` times the codes."""
    registers = []
    for word in words:
        rotated = hopper.pure_asm("shf.r.wrap.b32 $0, $1, $1, 4;", "=r,r", [word], word.type)
        for source in (word, rotated):
            fields = arith.andi(source, i32(0x87878787))
            # A negative code's magnitude is stored less one.
            negative = arith.andi(arith.shrui(fields, i32(7)), i32(0x01010101))
            registers.append(arith.addi(fields, negative))
    return registers


def load_scales(address: ir.Value, scale_dtype: Any) -> tuple[ir.Value, ir.Value]:
    """Two neighbouring group scales as float32. Zeros, which only copies from outside the weight bring, become ones."""
    i16, word, single = ir.IntegerType.get_signless(16), ir.IntegerType.get_signless(32), ir.F32Type.get()
    if scale_dtype == jnp.float8_e4m3fn:
        [raw] = hopper.asm("ld.shared.u16 $0, [$1];", "=h,r", [address], [i16])
        outside = arith.cmpi(arith.CmpIPredicate.eq, raw, hopper.constant(0, bits=16))
        raw = arith.select(outside, hopper.constant(0x3838, bits=16), raw)
        halves = hopper.pure_asm("cvt.rn.f16x2.e4m3x2 $0, $1;", "=r,h", [raw], word)
        widen = "{{ .reg .b16 l, h; mov.b32 {{l, h}}, $1; cvt.f32.f16 $0, {}; }}"
        low, high = (hopper.pure_asm(widen.format(part), "=f,r", [halves], single) for part in "lh")
        return low, high
    [raw] = hopper.asm("ld.shared.b32 $0, [$1];", "=r,r", [address], [word])
    outside = arith.cmpi(arith.CmpIPredicate.eq, raw, i32(0))
    raw = arith.select(outside, i32(0x3F803F80), raw)
    low, high = arith.shli(raw, i32(16)), arith.andi(raw, i32(0xFFFF0000))
    return arith.bitcast(single, low), arith.bitcast(single, high)


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


class _Operations:
    """The register-level steps of one product, as functions that a Pallas kernel calls."""

    def __init__(self, m: int, n: int, group_size: int, scale_dtype: Any, tiling: Tiling) -> None:
        self.m, self.n, self.tiling = m, n, tiling
        self.group_size, self.scale_dtype = group_size, scale_dtype
        self.groups = TILE_K // group_size
        self.half = tiling.tokens // tiling.halves
        self.registers = self.half // 2
        rows, columns = tile_shape(group_size, scale_dtype)
        self.tile_bytes = 4 * rows * columns
        self.swizzle = (cast(Any, plgpu.SwizzleTransform)(128),)
        self.scalar = plgpu.Layout.WG_SPLAT(())
        containers = {
            "accumulator": (self.registers, jnp.float32),
            "operand": (16, jnp.int32),
            "ratios": (2 * self.groups, jnp.float32),
            "pair": (2, jnp.float32),
            "factors": (-(-tiling.tokens // 32), jnp.float32),
        }
        self.layout = {name: hopper.container_layout(count) for name, (count, _) in containers.items()}
        self.type = {name: hopper.container_type(count, dtype) for name, (count, dtype) in containers.items()}

    def load_weights(self) -> Operation:
        """``(stage, warpgroup, scales before) -> (operand, ratios, first scales, last scales)``.

        The ratios bring a sum in units of one group's scale to those of the next, for each group of the step.
        """

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), self.scalar, self.layout["pair"]),
            return_type=(self.type["operand"], self.type["ratios"], self.type["pair"], self.type["pair"]),
        )
        def load(_: Any, stage: Any, warpgroup: Any, before: Any) -> Any:
            tile = arith.muli(warpgroup.registers.item(), i32(self.tile_bytes))
            tile = arith.addi(hopper.shared_address(stage), tile)
            thread = hopper.thread_in_warpgroup()
            address = arith.addi(tile, arith.muli(thread, i32(16)))
            words = hopper.load_shared_x4(address) + hopper.load_shared_x4(address, 2048)
            size = jnp.dtype(self.scale_dtype).itemsize
            address = arith.addi(tile, arith.muli(arith.shrui(thread, i32(2)), i32(2 * size)))
            scales = [
                load_scales(arith.addi(address, i32(4 * CODE_WORDS + g * TILE_N * size)), self.scale_dtype)
                for g in range(self.groups)
            ]
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
            registers = hopper.wait_for_wgmma(in_flight, hopper.unpack(accumulator), keep)
            return hopper.pack(by_row(registers, hopper.unpack(ratios)[2 * group : 2 * group + 2]))

        return cast(Operation, wait)

    def multiply(self, half: int, group: int) -> Operation:
        """``(accumulator, operand, tokens, is first) -> accumulator``: adds a group's product, which is left to run."""

        @plgpu.inline_mgpu(
            arg_types=(
                self.layout["accumulator"], self.layout["operand"], plgpu.RefType(self.swizzle), self.scalar,
            ),
            return_type=self.type["accumulator"],
        )  # fmt: skip
        def issue(_: Any, accumulator: Any, operand: Any, tokens: Any, first: Any) -> Any:
            per_group = 16 // self.groups
            registers = hopper.unpack(operand)[group * per_group : (group + 1) * per_group]
            start = half * self.half * TILE_K + group * self.group_size
            address = arith.addi(hopper.shared_address(tokens), i32(start))
            accumulate = i32(1)
            if group == 0:
                later = arith.cmpi(arith.CmpIPredicate.eq, first.registers.item(), i32(0))
                accumulate = arith.extui(ir.IntegerType.get_signless(32), later)
            descriptor = hopper.k_major_descriptor(address)
            return hopper.pack(hopper.wgmma_e4m3(hopper.unpack(accumulator), registers, descriptor, accumulate))

        return cast(Operation, issue)

    def load_factors(self) -> Operation:
        """``(token scales, tensor scale, first token) -> factors``: lane l holds those of tokens l, l + 32, ..."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), self.scalar), return_type=self.type["factors"])
        def load(_: Any, token_scales: Any, tensor_scale: Any, start: Any) -> Any:
            lane = arith.andi(hopper.thread_in_warpgroup(), i32(31))
            always = hopper.constant(1, bits=1)
            scale = load_if(float_address(tensor_scale, i32(0)), always)
            scale = arith.mulf(scale, f32(1 / CODE_UNIT))
            factors = []
            for i in range(-(-self.tiling.tokens // 32)):
                token = arith.addi(arith.addi(lane, i32(32 * i)), start.registers.item())
                exists = arith.cmpi(arith.CmpIPredicate.slt, token, i32(self.m))
                factors.append(arith.mulf(load_if(float_address(token_scales, token), exists), scale))
            return hopper.pack(factors)

        return cast(Operation, load)

    def load_bias(self) -> Operation:
        """``(bias, first output) -> pair``: the bias of a thread's two outputs."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), self.scalar), return_type=self.type["pair"])
        def load(_: Any, bias: Any, start: Any) -> Any:
            thread = hopper.thread_in_warpgroup()
            row = arith.addi(
                arith.muli(arith.shrui(thread, i32(5)), i32(16)), arith.andi(arith.shrui(thread, i32(2)), i32(7))
            )
            row = arith.addi(row, start.registers.item())
            pair = []
            for offset in (0, 8):
                output = arith.addi(row, i32(offset))
                exists = arith.cmpi(arith.CmpIPredicate.slt, output, i32(self.n))
                pair.append(load_if(float_address(bias, output), exists))
            return hopper.pack(pair)

        return cast(Operation, load)

    def store(self, half: int, has_bias: bool) -> Operation:
        """``(accumulator, scales, factors, y in shared memory[, bias]) -> ()``: a half's results, in bf16."""

        @plgpu.inline_mgpu(
            arg_types=(
                self.layout["accumulator"], self.layout["pair"], self.layout["factors"], plgpu.RefType(self.swizzle),
                *[self.layout["pair"]] * has_bias,
            ),
            return_type=(),
        )  # fmt: skip
        def write(_: Any, accumulator: Any, scales: Any, factors: Any, y: Any, *bias: Any) -> Any:
            registers = by_row(hopper.unpack(accumulator), hopper.unpack(scales))
            factors = hopper.unpack(factors)
            thread = hopper.thread_in_warpgroup()
            lane, warp = arith.andi(thread, i32(31)), arith.shrui(thread, i32(5))
            column = arith.muli(arith.andi(lane, i32(3)), i32(2))
            # Where the lane's row of eight outputs goes, in a matrix of 128-byte rows with the 128-byte swizzle.
            token = arith.addi(arith.andi(lane, i32(7)), arith.muli(arith.shrui(lane, i32(4)), i32(8)))
            chunk = arith.addi(arith.muli(warp, i32(2)), arith.andi(arith.shrui(lane, i32(3)), i32(1)))
            chunk = arith.xori(chunk, arith.andi(lane, i32(7)))
            address = arith.addi(arith.muli(token, i32(128)), arith.muli(chunk, i32(16)))
            address = arith.addi(hopper.shared_address(y), address)
            packed = []
            for j in range(self.half // 8):
                first = half * self.half + 8 * j
                pair = [hopper.shuffle(factors[first // 32], arith.addi(column, i32(first % 32 + c))) for c in range(2)]
                for o in range(2):
                    part = registers[4 * j + 2 * o : 4 * j + 2 * o + 2]
                    part = [arith.mulf(r, s) for r, s in zip(part, pair, strict=True)]
                    if has_bias:
                        part = [arith.addf(r, hopper.unpack(bias[0])[o]) for r in part]
                    packed.append(hopper.to_bf16x2(*part))
            for j in range(0, self.half // 8, 2):
                offset = (half * self.half + 8 * j) * 128
                hopper.store_transposed(arith.addi(address, i32(offset)), packed[2 * j : 2 * j + 4])
            return ()

        return cast(Operation, write)

    def send(self, half: int) -> Operation:
        """``(accumulator, scales, received) -> ()``: a partial sum, to the first block of the cluster."""

        @plgpu.inline_mgpu(arg_types=(self.layout["accumulator"], self.layout["pair"], plgpu.RefType()), return_type=())
        def write(_: Any, accumulator: Any, scales: Any, received: Any) -> Any:
            registers = by_row(hopper.unpack(accumulator), hopper.unpack(scales))
            address = arith.muli(hopper.thread_in_warpgroup(), i32(16))
            address = hopper.in_block(arith.addi(hopper.shared_address(received), address), 0)
            for i in range(0, self.registers, 4):
                offset = (half * self.registers + i) * 512
                hopper.asm(
                    f"st.shared::cluster.v4.f32 [$0+{offset}], {{$1, $2, $3, $4}};", "r,f,f,f,f",
                    [address, *registers[i : i + 4]], [],
                )  # fmt: skip
            return ()

        return cast(Operation, write)

    def gather(self, half: int) -> Operation:
        """``(accumulator, scales, received) -> accumulator``: adds what the other blocks sent, in their order."""

        @plgpu.inline_mgpu(
            arg_types=(self.layout["accumulator"], self.layout["pair"], plgpu.RefType()),
            return_type=self.type["accumulator"],
        )
        def read(_: Any, accumulator: Any, scales: Any, received: Any) -> Any:
            registers = by_row(hopper.unpack(accumulator), hopper.unpack(scales))
            address = arith.muli(hopper.thread_in_warpgroup(), i32(16))
            address = arith.addi(hopper.shared_address(received), address)
            for block in range(self.tiling.split - 1):
                for i in range(0, self.registers, 4):
                    offset = block * self.tiling.tokens * BLOCK_N * 4 + (half * self.registers + i) * 512
                    part = hopper.asm(
                        f"ld.shared.v4.f32 {{$0, $1, $2, $3}}, [$4+{offset}];", "=f,=f,=f,=f,r",
                        [address], [ir.F32Type.get()] * 4,
                    )  # fmt: skip
                    registers[i : i + 4] = [arith.addf(a, b) for a, b in zip(registers[i : i + 4], part, strict=True)]
            return hopper.pack(registers)

        return cast(Operation, read)


def make_kernel(m: int, n: int, k: int, group_size: int, scale_dtype: Any, has_bias: bool, t: Tiling) -> Operation:
    """The kernel for one shape: ``(x8, x_scale, tiles, tensor_scale [1], bias [n] or [1]) -> y [m, n]`` bf16."""
    ops = _Operations(m, n, group_size, scale_dtype, t)
    steps = -(-k // TILE_K)
    if t.split > 1:  # every block takes as many steps; those behind the last one read zeros
        steps = math.ceil(steps / (t.split * t.unroll)) * t.unroll
    rows, token_tiles = -(-n // BLOCK_N), -(-m // t.tokens)
    row_groups = -(-rows // t.share)
    tiles = row_groups * token_tiles
    persistent = t.persistent and t.split == 1
    blocks = min(STREAMING_MULTIPROCESSORS // t.share, tiles) if persistent else tiles
    cluster = t.share * t.split

    def body(
        x: Any, x_scale: Any, w: Any, tensor_scale: Any, bias: Any, y: Any,
        x_smem: Any, w_smem: Any, y_smem: Any, full: Any, empty: Any, received: Any = None,
    ) -> None:  # fmt: skip
        block, warpgroup = jax.lax.axis_index("block"), jax.lax.axis_index("warpgroup")
        peer = jax.lax.axis_index("peer") if cluster > 1 else jnp.int32(0)
        first_step = peer * steps if t.split > 1 else 0
        mine = jax.lax.div(tiles - block + blocks - 1, jnp.int32(blocks))
        if cluster > 1:
            hopper.cluster_arrive()

        def tile_of(i: Any) -> tuple[Any, Any]:
            index = block + i * blocks
            row, token = index, jnp.int32(0)
            if token_tiles > 1:
                row, token = plgpu.planar_snake(index, (row_groups, token_tiles), 1, min(t.snake, token_tiles))
            return row * t.share + (peer if t.share > 1 else 0), token

        def slot_of(i: Any, s: Any) -> Any:
            return jax.lax.rem(i * steps + s, t.stages)

        @pl.when(warpgroup == WARPGROUPS)
        def produce() -> None:
            if persistent:
                plgpu.set_max_registers(40, action="decrease")
            if t.share > 1:  # the other block's barriers must exist
                hopper.cluster_wait()

            def produce_tile(i: Any, _: None) -> None:
                row, token = tile_of(i)

                def produce_step(s: Any, _: None) -> None:
                    slot, at = slot_of(i, s), first_step + s

                    @pl.when(i * steps + s >= t.stages)
                    def reuse() -> None:
                        plgpu.barrier_wait(empty.at[slot])

                    plgpu.copy_gmem_to_smem(
                        x.at[pl.ds(token * t.tokens, t.tokens), pl.ds(at * TILE_K, TILE_K)], x_smem.at[slot],
                        full.at[slot], collective_axes="peer" if t.share > 1 else None,
                    )  # fmt: skip
                    plgpu.copy_gmem_to_smem(
                        w.at[pl.ds(row * WARPGROUPS, WARPGROUPS), at], w_smem.at[slot], full.at[slot]
                    )

                jax.lax.fori_loop(0, steps, produce_step, None)

            jax.lax.fori_loop(0, mine, produce_tile, None)
            if t.split > 1:
                hopper.cluster_wait()
                hopper.cluster_arrive()

        def release(barrier: Any) -> None:
            if t.share > 1:  # one thread arrives for all of them, in both blocks
                hopper.warpgroup_barrier()
            plgpu.barrier_arrive(barrier)

        def compute_tile(i: Any, _: None) -> None:
            row, token = tile_of(i)
            output = row * BLOCK_N + warpgroup * TILE_N
            factors = ops.load_factors()(x_scale, tensor_scale, token * t.tokens)
            ones = plgpu.layout_cast(jnp.ones((256,), jnp.float32), ops.layout["pair"])

            def fetch(s: Any, last: Any) -> Any:
                """Operand and scales of step s; behind the tile's last step, those of that step again."""

                @pl.when(s < steps)
                def wait() -> None:
                    plgpu.barrier_wait(full.at[slot_of(i, s)])

                return ops.load_weights()(w_smem.at[slot_of(i, jnp.minimum(s, steps - 1))], warpgroup, last)

            def chain(s: Any, count: int, carry: Any) -> Any:
                """``count`` steps whose wgmmas overlap; none runs at the end.

                The compiler serialises wgmmas that still run where a loop begins anew, hence chains of several steps.
                """
                operand, ratios, unit, last, accumulators = carry
                accumulators = list(accumulators)
                before = operand
                for u in range(count):
                    tokens = x_smem.at[slot_of(i, s + u)]
                    first = (s + u == 0).astype(jnp.int32)
                    for group in range(ops.groups):
                        accumulators[0] = ops.multiply(0, group)(accumulators[0], operand, tokens, first)
                        if t.halves == 2:
                            if u or group:
                                accumulators[1] = ops.settle(1, group, 1)(accumulators[1], ratios, before)
                                if group == 0:
                                    release(empty.at[slot_of(i, s + u - 1)])
                            accumulators[1] = ops.multiply(1, group)(accumulators[1], operand, tokens, first)
                        following, next_ratios, next_group = operand, ratios, group + 1
                        if group == ops.groups - 1:
                            following, next_ratios, unit, last = fetch(s + u + 1, last)
                            next_group = 0
                        accumulators[0] = ops.settle(t.halves - 1, next_group, 2)(
                            accumulators[0], next_ratios, operand, following
                        )
                        if t.halves == 1 and group == ops.groups - 1:
                            release(empty.at[slot_of(i, s + u)])
                        before, operand, ratios = operand, following, next_ratios
                if t.halves == 2:
                    accumulators[1] = ops.settle(0, 0, 1)(accumulators[1], ratios, before)
                    release(empty.at[slot_of(i, s + count - 1)])
                return operand, ratios, unit, last, tuple(accumulators)

            empty_sum = jnp.zeros((hopper.WARPGROUP * ops.registers,), jnp.float32)
            empty_sum = plgpu.layout_cast(empty_sum, ops.layout["accumulator"])
            carry = (*fetch(0, ones), (empty_sum,) * t.halves)
            rest = steps % t.unroll
            if rest:
                carry = chain(jnp.int32(0), rest, carry)
            _, _, unit, _, accumulators = jax.lax.fori_loop(
                0, steps // t.unroll, lambda j, carry: chain(rest + j * t.unroll, t.unroll, carry), carry
            )

            def write(accumulators: Any, unit: Any) -> None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                offsets = [ops.load_bias()(bias, output)] if has_bias else []
                for h in range(t.halves):
                    ops.store(h, has_bias)(accumulators[h], unit, factors, y_smem.at[warpgroup], *offsets)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        y_smem.at[warpgroup, pl.ds(h * ops.half, ops.half)],
                        y.at[pl.ds(token * t.tokens + h * ops.half, ops.half), pl.ds(output, TILE_N)],
                    )

            if t.split == 1:
                write(accumulators, unit)
                return
            hopper.cluster_wait()

            @pl.when(peer > 0)
            def other() -> None:
                for h in range(t.halves):
                    ops.send(h)(accumulators[h], unit, received.at[peer - 1, warpgroup])
                hopper.cluster_arrive()

            @pl.when(peer == 0)
            def leader() -> None:
                hopper.cluster_arrive()
                hopper.cluster_wait()
                write([ops.gather(h)(accumulators[h], unit, received.at[0, warpgroup]) for h in range(t.halves)], ones)

        @pl.when(warpgroup < WARPGROUPS)
        def compute() -> None:
            if persistent:
                plgpu.set_max_registers(232, action="increase")
            if t.share > 1:
                hopper.cluster_wait()
            jax.lax.fori_loop(0, mine, compute_tile, None)
            plgpu.wait_smem_to_gmem(0)
            if t.share > 1:  # the other block still arrives on this one's barriers
                hopper.cluster_arrive()
                hopper.cluster_wait()

    barriers = plgpu.Barrier(num_arrivals=2, num_barriers=t.stages)
    shared = plgpu.ClusterBarrier(collective_axes=("peer",), num_arrivals=2, num_barriers=t.stages)
    scratch: list[Any] = [
        plgpu.SMEM((t.stages, t.tokens, TILE_K), jnp.float8_e4m3fn, transforms=ops.swizzle),
        plgpu.SMEM((t.stages, WARPGROUPS, *tile_shape(group_size, scale_dtype)), jnp.int32),
        plgpu.SMEM((WARPGROUPS, t.tokens, TILE_N), jnp.bfloat16, transforms=ops.swizzle),
        barriers,
        shared if t.share > 1 else barriers,
    ]
    if t.split > 1:
        scratch.append(plgpu.SMEM((t.split - 1, WARPGROUPS, TILE_N * t.tokens), jnp.float32))
    cluster_axis: dict[str, Any] = {"cluster": (cluster,), "cluster_names": ("peer",)} if cluster > 1 else {}
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n), jnp.bfloat16),
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,  # every barrier that is needed is written out
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        **cluster_axis,
    )
    return cast(Operation, kernel)


def unsupported(m: int, n: int, out_dtype: Any) -> str | None:
    """Why the kernel cannot make a result ``[m, n]``, or None if it can."""
    if n % TILE_N:
        return f"{n=} is no multiple of {TILE_N}"
    if m == 0:
        return "there are no tokens"
    if jnp.dtype(out_dtype) != jnp.bfloat16:
        return f"out_dtype={jnp.dtype(out_dtype).name} is not bfloat16"
    return None


def matmul(
    x8: jax.Array,
    x_scale: jax.Array,
    tiles: jax.Array,
    tensor_scale: jax.Array,
    bias: jax.Array | None = None,
    *,
    n: int,
    group_size: int,
    scale_dtype: Any,
    out_dtype: Any = jnp.bfloat16,
    tiling: Tiling | None = None,
) -> jax.Array:
    """``y[m, n] = x_scale[m] · tensor_scale · Σ_k x8[m, k] · W[n, k] + bias[n]`` with exact group scales.

    Args:
      x8: ``[m, k]`` e4m3.
      x_scale: ``[m]`` float32.
      tiles: int32, what :func:`pallas_kernels.weight_layout.to_tiles` makes of the weight.
      tensor_scale: scalar float32.
      bias: ``[n]`` float, or None.
      n: outputs, a multiple of 64.
      group_size: 32, 64 or 128, a divisor of k.
      scale_dtype: of the group scales in ``tiles``, e4m3 or bf16.
      out_dtype: bfloat16; there is no other.
      tiling: chosen by :func:`choose_tiling` if None.

    Returns:
      ``[m, n]`` bf16. Sums run in the tensor core's accumulators, which keep fewer bits than float32.
    """
    m, k = x8.shape
    if tiling is None:
        rows, columns = tile_shape(group_size, scale_dtype)
        tiling = choose_tiling(m, n, k, 4 * rows * columns)
    assert unsupported(m, n, out_dtype) is None
    kernel = make_kernel(m, n, k, group_size, jnp.dtype(scale_dtype), bias is not None, tiling)
    offsets = jnp.zeros((1,), jnp.float32) if bias is None else bias.astype(jnp.float32)
    return cast(jax.Array, kernel(x8, x_scale, tiles, tensor_scale.reshape(1), offsets))
