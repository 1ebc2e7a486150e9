"""The register-level steps of the matvec, which :mod:`pallas_kernels.mosaic_matvec` puts in order."""

import dataclasses
from typing import Any, cast

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import hopper
from pallas_kernels.hopper import f32, i32
from pallas_kernels.matmul_steps import Operation, by_row, decode_scales, float_address, load_if
from pallas_kernels.tiling import FEW_TOKENS, SHARED_MEMORY, STREAMING_MULTIPROCESSORS
from pallas_kernels.weight_layout import CODE_WORDS, TILE_K, TILE_N, tile_shape

UNIT = 16
WARPGROUPS = 4
WARPS = 4 * WARPGROUPS
THREADS = 32 * WARPS
PADDING = 16  # bytes behind a token's inputs in shared memory, so that eight tokens' words lie in different banks

# What a code of 1 is worth when its bits are put into the upper byte of a float16.
HALF_CODE_UNIT = 2.0**-16


@dataclasses.dataclass(frozen=True)
class Streaming:
    """How the product is cut into pieces.

    Attributes:
      ahead: tiles that each warp reads ahead.
      rounds: tiles of each warp, per unit, whose inputs shared memory holds; where that is not all of them, the units
        are gone through several times.
    """

    ahead: int
    rounds: int


def partials_bytes(m: int) -> int:
    """Shared memory for two sets of partial sums."""
    return 2 * WARPS * UNIT * 8 * -(-m // 8) * 4


def choose_streaming(m: int, n: int, k: int) -> Streaming | None:
    """All inputs in shared memory if they fit, else the fewest equal parts; None if the kernel takes no such shape."""
    if not 1 <= m <= FEW_TOKENS:
        return None
    all_rounds = -(-k // (TILE_K * WARPS))
    units_per_block = -(-n // (UNIT * STREAMING_MULTIPROCESSORS))
    sums = units_per_block * UNIT * 8 * -(-m // 8) * 4
    for parts in range(1, all_rounds + 1):
        rounds = -(-all_rounds // parts)
        inputs = m * (min(rounds * WARPS, -(-k // TILE_K)) * TILE_K + PADDING)
        # Each array is rounded up to 1 KB.
        if inputs + (sums if parts > 1 else 0) + partials_bytes(m) + 3 * 1024 <= SHARED_MEMORY:
            return Streaming(4, rounds)
    return None


class Steps:
    """The register-level steps for one shape; all take references or containers, and scalars as int32."""

    def __init__(self, m: int, n: int, k: int, group_size: int, scale_dtype: Any, cut: Streaming) -> None:
        self.m, self.n, self.k = m, n, k
        self.scale_dtype = scale_dtype
        self.groups = TILE_K // group_size
        self.blocks_of_tokens = -(-m // 8)  # as the tensor core takes them
        self.tiles = -(-k // TILE_K)
        rows, columns = tile_shape(group_size, scale_dtype)
        self.tile_bytes = 4 * rows * columns
        self.held = min(cut.rounds * WARPS, self.tiles)  # tiles whose inputs shared memory holds
        self.pitch = self.held * TILE_K + PADDING
        self.scalar = plgpu.Layout.WG_SPLAT(())
        containers = {
            "codes": (8, jnp.int32),
            "scales": (self.groups, jnp.int32),
            "sums": (4 * self.blocks_of_tokens, jnp.float32),
            "factor": (1, jnp.float32),
        }
        self.layout = {name: hopper.container_layout(count) for name, (count, _) in containers.items()}
        self.type = {name: hopper.container_type(count, dtype) for name, (count, dtype) in containers.items()}

    def fetch(self) -> Operation:
        """``(tiles, unit, first tile) -> (codes, scales)``: starts to read a warp's share of its tile of the 16.

        Behind the last tile nothing is read; the scales are zero then, and the codes any.
        """

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), self.scalar, self.scalar), return_type=(self.type["codes"], self.type["scales"])
        )
        def load(_: Any, tiles: Any, unit: Any, first: Any) -> Any:
            i64, word = ir.IntegerType.get_signless(64), ir.IntegerType.get_signless(32)
            thread, unit = utils.thread_idx(), unit.registers.item()
            lane, warp = arith.andi(thread, i32(31)), arith.shrui(thread, i32(5))
            tile = arith.addi(first.registers.item(), warp)
            exists = arith.extui(word, arith.cmpi(arith.CmpIPredicate.slt, tile, i32(self.tiles)))
            index = arith.addi(arith.muli(arith.shrui(unit, i32(2)), i32(self.tiles)), tile)
            offset = arith.muli(arith.extui(i64, index), hopper.constant(self.tile_bytes, bits=64))
            start = arith.addi(llvm.ptrtoint(i64, utils.memref_ptr(tiles)), offset)
            share = arith.andi(unit, i32(3))
            within = arith.addi(arith.muli(share, i32(1024)), arith.muli(lane, i32(16)))
            address = arith.addi(start, arith.extui(i64, within))
            codes = []
            for part in range(2):
                codes += hopper.asm(
                    "{ .reg .pred p; setp.ne.b32 p, $5, 0; "
                    f"@p ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {{$0, $1, $2, $3}}, [$4+{512 * part}]; }}",
                    "=&r,=&r,=&r,=&r,l,r", [address, exists], [word] * 4,
                )  # fmt: skip
            size = jnp.dtype(self.scale_dtype).itemsize
            row = arith.addi(arith.muli(share, i32(8)), arith.shrui(lane, i32(2)))
            address = arith.addi(start, arith.extui(i64, arith.muli(row, i32(2 * size))))
            scales = []
            for group in range(self.groups):
                offset = 4 * CODE_WORDS + group * TILE_N * size
                scales += hopper.asm(
                    "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; "
                    f"@p ld.global.nc.{'u16' if size == 1 else 'b32'} $0, [$1+{offset}]; }}",
                    "=&r,l,r", [address, exists], [word],
                )  # fmt: skip
            return hopper.pack(codes), hopper.pack(scales)

        return cast(Operation, load)

    def stage(self) -> Operation:
        """``(x8, held inputs, first tile) -> ()``: copies the inputs of the tiles from ``first`` on, zeros behind them.

        Each word's bytes are put in the order 0, 2, 1, 3, in which the codes come out of their words.
        """

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), self.scalar), return_type=())
        def copy(_: Any, x: Any, held: Any, first: Any) -> Any:
            i64, word = ir.IntegerType.get_signless(64), ir.IntegerType.get_signless(32)
            source = llvm.ptrtoint(i64, utils.memref_ptr(x))
            target = hopper.shared_address(held)
            start = arith.muli(first.registers.item(), i32(TILE_K))
            chunks = self.held * TILE_K // 16
            for base in range(0, self.m * chunks, THREADS * 8):
                pieces = []
                for at in range(base, min(base + THREADS * 8, self.m * chunks), THREADS):
                    piece = arith.addi(utils.thread_idx(), i32(at))
                    token, chunk = arith.divui(piece, i32(chunks)), arith.remui(piece, i32(chunks))
                    column = arith.muli(chunk, i32(16))
                    here = arith.cmpi(arith.CmpIPredicate.ult, token, i32(self.m))
                    inside = arith.cmpi(arith.CmpIPredicate.ult, arith.addi(start, column), i32(self.k))
                    inside = arith.extui(word, arith.andi(here, inside))
                    row = arith.muli(arith.extui(i64, token), hopper.constant(self.k, bits=64))
                    address = arith.addi(arith.addi(source, row), arith.extui(i64, arith.addi(start, column)))
                    words = hopper.asm(
                        "{ .reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; "
                        "mov.b32 $3, 0; @p ld.global.nc.v4.u32 {$0, $1, $2, $3}, [$4]; }",
                        "=&r,=&r,=&r,=&r,l,r", [address, inside], [word] * 4,
                    )  # fmt: skip
                    place = arith.addi(target, arith.addi(arith.muli(token, i32(self.pitch)), column))
                    pieces.append((arith.extui(word, here), place, words))
                for here, place, words in pieces:
                    swapped = [hopper.pure_asm("prmt.b32 $0, $1, 0, 0x3120;", "=r,r", [w], word) for w in words]
                    hopper.asm(
                        "{ .reg .pred p; setp.ne.b32 p, $5, 0; @p st.shared.v4.b32 [$0], {$1, $2, $3, $4}; }",
                        "r,r,r,r,r,r", [place, *swapped, here], [],
                    )  # fmt: skip
            return ()

        return cast(Operation, copy)

    def barrier(self) -> Operation:
        """``() -> ()``: waits for all threads of the block."""

        @plgpu.inline_mgpu(arg_types=(), return_type=())
        def wait(_: Any) -> Any:
            hopper.block_barrier()
            return ()

        return cast(Operation, wait)

    def multiply(self) -> Operation:
        """``(sums, is first, codes, scales, held inputs, first held tile) -> sums``: adds a tile's product."""

        @plgpu.inline_mgpu(
            arg_types=(
                self.layout["sums"], self.scalar, self.layout["codes"], self.layout["scales"], plgpu.RefType(),
                self.scalar,
            ),
            return_type=self.type["sums"],
        )  # fmt: skip
        def add(_: Any, sums: Any, is_first: Any, codes: Any, scales: Any, held: Any, first: Any) -> Any:
            word, single = ir.IntegerType.get_signless(32), ir.F32Type.get()
            thread = utils.thread_idx()
            lane, warp = arith.andi(thread, i32(31)), arith.shrui(thread, i32(5))
            tile = arith.minui(arith.addi(first.registers.item(), warp), i32(self.held - 1))
            column = arith.addi(arith.muli(tile, i32(TILE_K)), arith.muli(arith.andi(lane, i32(3)), i32(4)))
            inputs = []
            for block in range(self.blocks_of_tokens):
                # Lanes of tokens behind the last repeat it; what they compute is not used.
                token = arith.addi(arith.shrui(lane, i32(2)), i32(8 * block))
                token = arith.minui(token, i32(self.m - 1))
                inputs.append(arith.addi(column, arith.muli(token, i32(self.pitch))))
            base = hopper.shared_address(held)
            inputs = [arith.addi(base, offset) for offset in inputs]
            starts_anew = arith.cmpi(arith.CmpIPredicate.ne, is_first.registers.item(), i32(0))
            total = [arith.select(starts_anew, f32(0), r) for r in hopper.unpack(sums)]
            codes, scales = hopper.unpack(codes), hopper.unpack(scales)
            per_group = 8 // self.groups
            for group in range(self.groups):
                part = [f32(0)] * len(total)
                for u in range(group * per_group, (group + 1) * per_group):
                    a = decode_to_halves(codes[u])
                    for block in range(self.blocks_of_tokens):
                        [x] = hopper.asm(f"ld.shared.b32 $0, [$1+{16 * u}];", "=r,r", [inputs[block]], [word])
                        part[4 * block : 4 * block + 4] = hopper.asm(
                            "{ .reg .b16 l, h; .reg .b32 b0, b1; mov.b32 {l, h}, $8; "
                            "cvt.rn.f16x2.e4m3x2 b0, l; cvt.rn.f16x2.e4m3x2 b1, h; "
                            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {b0, b1}, {$9, $10, $11, $12}; }",
                            "=f,=f,=f,=f,r,r,r,r,r,f,f,f,f", [*a, x, *part[4 * block : 4 * block + 4]], [single] * 4,
                        )  # fmt: skip
                pair = decode_scales(scales[group], self.scale_dtype)
                part = by_row(part, list(pair))
                total = [arith.addf(t, p) for t, p in zip(total, part, strict=True)]
            return hopper.pack(total)

        return cast(Operation, add)

    def load_factor(self) -> Operation:
        """``(token scales, tensor scale) -> factor``: that of the sums of thread 16 t + o, which are token t's."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()), return_type=self.type["factor"])
        def load(_: Any, token_scales: Any, tensor_scale: Any) -> Any:
            token = arith.shrui(utils.thread_idx(), i32(4))
            exists = arith.cmpi(arith.CmpIPredicate.ult, token, i32(self.m))
            scale = load_if(float_address(tensor_scale, i32(0)), hopper.constant(1, bits=1))
            scale = arith.mulf(scale, f32(1 / HALF_CODE_UNIT))
            return hopper.pack([arith.mulf(load_if(float_address(token_scales, token), exists), scale)])

        return cast(Operation, load)

    def finish(self, has_bias: bool, parts: int) -> Operation:
        """``(sums, partial sums, factor, bias, y, unit, part[, sums of units, unit of this block]) -> ()``.

        Adds up the warps' sums of a unit, in their order, and those of the parts before; of the last part, writes y.
        """
        tokens = 8 * self.blocks_of_tokens

        @plgpu.inline_mgpu(
            arg_types=(
                self.layout["sums"], plgpu.RefType(), self.layout["factor"], plgpu.RefType(), plgpu.RefType(),
                self.scalar, self.scalar, *([plgpu.RefType(), self.scalar] if parts > 1 else []),
            ),
            return_type=(),
        )  # fmt: skip
        def write(
            _: Any, sums: Any, partial: Any, factor: Any, bias: Any, y: Any, unit: Any, part: Any, *before: Any
        ) -> Any:
            i64, word, single = ir.IntegerType.get_signless(64), ir.IntegerType.get_signless(32), ir.F32Type.get()
            thread = utils.thread_idx()
            lane, warp = arith.andi(thread, i32(31)), arith.shrui(thread, i32(5))
            base = hopper.shared_address(partial)
            # [warp][output][token]
            row = arith.addi(arith.muli(warp, i32(UNIT)), arith.shrui(lane, i32(2)))
            column = arith.muli(arith.andi(lane, i32(3)), i32(2))
            address = arith.addi(base, arith.muli(arith.addi(arith.muli(row, i32(tokens)), column), i32(4)))
            registers = hopper.unpack(sums)
            for i in range(0, len(registers), 2):
                offset = 4 * (i // 4 * 8 + i % 4 // 2 * 8 * tokens)
                hopper.asm(
                    f"st.shared.v2.f32 [$0+{offset}], {{$1, $2}};", "r,f,f", [address, *registers[i : i + 2]], []
                )
            token, output = arith.shrui(thread, i32(4)), arith.andi(thread, i32(15))
            place = arith.addi(arith.muli(unit.registers.item(), i32(UNIT)), output)
            here = arith.andi(
                arith.cmpi(arith.CmpIPredicate.ult, token, i32(self.m)),
                arith.cmpi(arith.CmpIPredicate.ult, place, i32(self.n)),
            )
            offset_of_output = load_if(float_address(bias, place), here) if has_bias else None
            hopper.block_barrier()
            element = arith.addi(arith.muli(output, i32(tokens)), token)
            address = arith.addi(base, arith.muli(element, i32(4)))
            flag = arith.extui(word, here)
            load = "{{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.f32 $0, 0f00000000; @p ld.shared.f32 $0, [$1+{}]; }}"
            values = [
                hopper.asm(load.format(w * UNIT * tokens * 4), "=&f,r,r", [address, flag], [single])[0]
                for w in range(WARPS)
            ]
            while len(values) > 1:  # pairwise, for short chains and small errors
                values = [arith.addf(a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
            [total] = values
            last = here
            if parts > 1:
                kept, mine = before
                at = arith.addi(arith.muli(mine.registers.item(), i32(UNIT * tokens)), element)
                at = arith.addi(hopper.shared_address(kept), arith.muli(at, i32(4)))
                part = part.registers.item()
                later = arith.andi(here, arith.cmpi(arith.CmpIPredicate.ne, part, i32(0)))
                [sum_before] = hopper.asm(load.format(0), "=&f,r,r", [at, arith.extui(word, later)], [single])
                total = arith.addf(total, sum_before)
                hopper.asm(
                    "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.shared.f32 [$0], $1; }", "r,f,r", [at, total, flag], []
                )
                last = arith.andi(here, arith.cmpi(arith.CmpIPredicate.eq, part, i32(parts - 1)))
            result = arith.mulf(total, hopper.unpack(factor)[0])
            if offset_of_output is not None:
                result = arith.addf(result, offset_of_output)
            index = arith.muli(arith.extui(i64, token), hopper.constant(self.n, bits=64))
            index = arith.addi(index, arith.extui(i64, place))
            target = arith.addi(llvm.ptrtoint(i64, utils.memref_ptr(y)), arith.muli(index, hopper.constant(2, bits=64)))
            hopper.asm(
                "{ .reg .pred p; .reg .b16 b; setp.ne.b32 p, $2, 0; cvt.rn.bf16.f32 b, $1; @p st.global.b16 [$0], b; }",
                "l,f,r", [target, result, arith.extui(word, last)], [],
            )  # fmt: skip
            return ()

        return cast(Operation, write)


def decode_to_halves(word: ir.Value) -> list[ir.Value]:
    """A word of 8 codes as the first operand of an m16n8k16 product in float16, worth ``HALF_CODE_UNIT`` each.

    A code is (-1)^s (j + 1/2) - 1/2 where s is its sign and j its stored magnitude, and s, j and a half beside them
    are a subnormal float16 once they are masked out of the word.
    """
    word_type = word.type
    rotated = hopper.pure_asm("shf.r.wrap.b32 $0, $1, $1, 4;", "=r,r", [word], word_type)
    operand = []
    for shift in (8, 0):  # inputs 0 and 2, then 1 and 3 of four
        for source in (word, rotated):
            shifted = arith.shli(source, i32(shift)) if shift else source
            bits = hopper.pure_asm(
                "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [shifted, i32(0x87008700), i32(0x00800080)], word_type
            )
            operand.append(hopper.pure_asm("add.rn.f16x2 $0, $1, $2;", "=r,r,r", [bits, i32(0x80808080)], word_type))
    return operand
