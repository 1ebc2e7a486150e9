"""The register-level steps of the matvec, which :mod:`pallas_kernels.mosaic_matvec` puts in order."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import arithmetic, hopper, tensor_core
from pallas_kernels.hopper import f32, i32
from pallas_kernels.matmul_steps import Operation, float_address, load_if
from pallas_kernels.row_steps import balanced
from pallas_kernels.tiling import STREAMING_MULTIPROCESSORS, SUMS_PITCH, UNIT, WARPS, Streaming
from pallas_kernels.warp_slots import WarpSlots
from pallas_kernels.weight_layout import CODE_WORDS, SHARE_N, SHARES, TILE_K, share_bytes
from pallas_kernels.weight_steps import HALF_CODE_UNIT, decode_scales, decode_to_halves

THREADS = 32 * WARPS


class Steps:
    """The register-level steps for one shape; all take references or containers, and scalars as int32.

    Weights of ``sizes`` outputs each are multiplied with the same inputs as if they were one; a unit is of one of them.
    """

    def __init__(
        self, m: int, sizes: Sequence[int], k: int, group_size: int, scale_dtype: Any, out_dtype: Any, cut: Streaming
    ) -> None:
        self.m, self.sizes, self.k, self.cut = m, tuple(sizes), k, cut
        self.out_size = jnp.dtype(out_dtype).itemsize  # of bf16 or float32
        self.first_units = [sum(self.sizes[:i]) // UNIT for i in range(len(self.sizes))]
        self.scale_dtype = scale_dtype
        self.groups = TILE_K // group_size
        self.blocks_of_tokens = -(-m // 8)  # as the tensor core takes them
        self.tiles = -(-k // TILE_K)
        self.share_bytes = share_bytes(group_size, scale_dtype)
        self.slots = WarpSlots(WARPS, cut.slots, self.share_bytes)
        self.team, self.teams = cut.team, WARPS // cut.team
        self.units = sum(self.sizes) // UNIT
        self.blocks = min(STREAMING_MULTIPROCESSORS, self.units)
        self.results = -(-UNIT * m // (32 * cut.team))  # of a unit, that each thread adds up
        self.held = cut.rounds * cut.team  # tiles whose inputs shared memory holds, zeros behind the last one
        self.all_exist = cut.parts(k) * self.held == self.tiles  # tiles that warps are to take
        # Of a block of eight tokens a lane has sums of two outputs for two tokens, of which the second may be none.
        self.columns = 1 if m == 1 else 2
        self.pitch = cut.inputs_pitch()
        self.pieces = -(-self.m * self.held * TILE_K // (32 * THREADS))  # of inputs, that each thread stages
        self.scalar = plgpu.Layout.WG_SPLAT(())
        containers = {
            "inputs": (8 * self.pieces, jnp.int32),
            "location": (3, jnp.int32),
            "codes": (8, jnp.int32),
            "scales": (self.groups, jnp.int32),
            "sums": (2 * self.columns * self.blocks_of_tokens, jnp.float32),
            "factors": (self.results + len(self.sizes), jnp.float32),
        }
        self.layout = {name: hopper.container_layout(count) for name, (count, _) in containers.items()}
        self.type = {name: hopper.container_type(count, dtype) for name, (count, dtype) in containers.items()}

    def _in_team(self, warp: ir.Value) -> tuple[ir.Value, ir.Value]:
        """A warp's team, and its number there."""
        return arith.shrui(warp, i32(self.team.bit_length() - 1)), arith.andi(warp, i32(self.team - 1))

    def _unit(self, first: Any, team: ir.Value) -> ir.Value:
        """The unit that a team works on when the first one works on ``first``."""
        return arith.addi(first.registers.item(), arith.muli(team, i32(self.blocks)))

    def _of_weight(self, unit: ir.Value, values: Sequence[ir.Value]) -> ir.Value:
        """Of a value per weight, that of the weight which a unit belongs to."""
        picked = values[0]
        for first, value in zip(self.first_units[1:], values[1:], strict=True):
            picked = arith.select(arith.cmpi(arith.CmpIPredicate.ult, unit, i32(first)), picked, value)
        return picked

    def _in_weight(self, unit: ir.Value) -> ir.Value:
        """A unit's number in its weight."""
        return arith.subi(unit, self._of_weight(unit, [i32(first) for first in self.first_units]))

    def _start(self, unit: ir.Value, refs: Sequence[Any]) -> ir.Value:
        """Of an array per weight, the address of that of the weight which a unit belongs to."""
        return self._of_weight(unit, [hopper.global_address(ref, 1) for ref in refs])

    def locate(self) -> Operation:
        """``(warp, first unit, first tile, end, *tiles) -> location``: of a warp's shares of its team's unit.

        The address of the first one, and how many tiles there are from its tile on, up to ``end``: none behind the last
        unit.
        """

        @plgpu.inline_mgpu(
            arg_types=(self.slots.warp_layout, *[self.scalar] * 3, *[plgpu.RefType()] * len(self.sizes)),
            return_type=self.type["location"],
        )
        def find(_: Any, warp: Any, unit: Any, first: Any, end: Any, *tiles: Any) -> Any:
            i64 = ir.IntegerType.get_signless(64)
            team, member = self._in_team(hopper.unpack(warp)[0])
            unit, tile = self._unit(unit, team), arith.addi(first.registers.item(), member)
            exists = arith.cmpi(arith.CmpIPredicate.slt, unit, i32(self.units))
            left = arith.select(exists, arith.subi(end.registers.item(), tile), i32(0))
            within = self._in_weight(unit)
            index = arith.addi(arith.muli(arith.shrui(within, i32(2)), i32(self.tiles)), tile)
            index = arith.addi(arith.muli(index, i32(SHARES)), arith.andi(within, i32(SHARES - 1)))
            offset = arith.muli(arith.extui(i64, index), hopper.constant(self.share_bytes, bits=64))
            address = arith.addi(self._start(unit, tiles), offset)
            return hopper.pack([*hopper.split_address(address), left])

        return cast(Operation, find)

    def _exists(self, left: ir.Value, step: int) -> ir.Value:
        """Whether there is the tile that a warp takes so many steps behind its first one."""
        return arith.cmpi(arith.CmpIPredicate.slt, i32(0 if self.all_exist else step * self.team), left)

    def request(self, step: int, reads: bool) -> Operation:
        """``(warp, location, slots, arrivals, slot, [codes, scales]) -> ()``: has each warp's share of a step copied.

        What does not exist is not copied, and the slot's barrier completes at once. If somebody ``reads`` the slot
        before, given is what it gave.
        """

        @plgpu.inline_mgpu(
            arg_types=(
                self.slots.warp_layout, self.layout["location"], *[plgpu.RefType()] * 2, self.scalar,
                *[self.layout["codes"], self.layout["scales"]] * reads,
            ),
            return_type=(),
        )  # fmt: skip
        def copy(_: Any, warp: Any, location: Any, slots: Any, arrivals: Any, slot: Any, *given: Any) -> Any:
            [warp, zero], [*halves, left] = hopper.unpack(warp), hopper.unpack(location)
            read = []
            if reads:  # of each load one register, the codes' two and that of the last scales
                codes, scales = map(hopper.unpack, given)
                read = [codes[3], codes[7], scales[-1]]
            slot = slot.registers.item()
            offset = hopper.constant(step * self.team * SHARES * self.share_bytes, bits=64)
            source = arith.addi(hopper.join_address(*halves), offset)
            size = i32(self.share_bytes)
            total = arith.select(self._exists(left, step), size, i32(0))
            self.slots.request(
                self.slots.place(slots, slot, warp), self.slots.barrier(arrivals, slot, warp),
                [(source, 0, size)], total, read, zero,
            )  # fmt: skip
            return ()

        return cast(Operation, copy)

    def take(self, step: int) -> Operation:
        """``(warp, location, slots, arrivals, slot, parity) -> (codes, scales)``: waits for a slot and reads it.

        Of a tile that does not exist the scales are zero, and the codes any; if its unit does not either, both are any.
        """

        @plgpu.inline_mgpu(
            arg_types=(self.slots.warp_layout, self.layout["location"], *[plgpu.RefType()] * 2, *[self.scalar] * 2),
            return_type=(self.type["codes"], self.type["scales"]),
        )
        def read(_: Any, warp: Any, location: Any, slots: Any, arrivals: Any, slot: Any, parity: Any) -> Any:
            word = ir.IntegerType.get_signless(32)
            lane, slot = arith.andi(utils.thread_idx(), i32(31)), slot.registers.item()
            [warp, _], [*_, left] = hopper.unpack(warp), hopper.unpack(location)
            hopper.wait_for_phase(self.slots.barrier(arrivals, slot, warp), parity.registers.item())
            place = self.slots.place(slots, slot, warp)
            address = arith.addi(place, arith.muli(lane, i32(16)))
            codes = hopper.load_shared(address) + hopper.load_shared(address, 512)
            size = jnp.dtype(self.scale_dtype).itemsize
            address = arith.addi(place, arith.muli(arith.shrui(lane, i32(2)), i32(2 * size)))
            scales = []
            for group in range(self.groups):
                load = f"ld.shared.{'u16' if size == 1 else 'b32'} $0, [$1+{4 * CODE_WORDS + group * SHARE_N * size}];"
                [scale] = hopper.asm(load, "=r,r", [address], [word])
                scales.append(scale if self.all_exist else arith.select(self._exists(left, step), scale, i32(0)))
            return hopper.pack(codes), hopper.pack(scales)

        return cast(Operation, read)

    def _pieces(self) -> list[tuple[ir.Value, ir.Value, ir.Value]]:
        """The token, the held input and whether there is such a token, for each piece of 32 that a thread stages."""
        pieces = []
        for at in range(0, THREADS * self.pieces, THREADS):
            piece = arith.addi(utils.thread_idx(), i32(at))
            chunks = i32(self.held * TILE_K // 32)
            token, column = arith.divui(piece, chunks), arith.muli(arith.remui(piece, chunks), i32(32))
            pieces.append((token, column, arith.cmpi(arith.CmpIPredicate.ult, token, i32(self.m))))
        return pieces

    def load_inputs(self) -> Operation:
        """``(x8, first tile) -> words``: reads the inputs of the tiles from ``first`` on, zeros behind them."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), self.scalar), return_type=self.type["inputs"])
        def load(_: Any, x: Any, first: Any) -> Any:
            i64 = ir.IntegerType.get_signless(64)
            source = llvm.ptrtoint(i64, utils.memref_ptr(x))
            start = arith.muli(first.registers.item(), i32(TILE_K))
            words = []
            for token, column, here in self._pieces():
                column = arith.addi(start, column)
                inside = arith.andi(here, arith.cmpi(arith.CmpIPredicate.ult, column, i32(self.k)))
                row = arith.muli(arith.extui(i64, token), hopper.constant(self.k, bits=64))
                address = arith.addi(arith.addi(source, row), arith.extui(i64, column))
                for half in range(2):
                    words += hopper.load_global(4, address, inside, 16 * half, hopper.READ_ONLY)
            return hopper.pack(words)

        return cast(Operation, load)

    def hold_inputs(self) -> Operation:
        """``(words, held inputs) -> ()``: puts them into shared memory.

        A lane of the tensor core's operand takes four neighbouring inputs of every sixteen, in the order 0, 2, 1, 3, in
        which the codes come out of their words. What it takes of 32 (float16) or 128 (e4m3) inputs lies together.
        """

        @plgpu.inline_mgpu(arg_types=(self.layout["inputs"], plgpu.RefType()), return_type=())
        def put(_: Any, inputs: Any, held: Any) -> Any:
            target, words = hopper.shared_address(held), hopper.unpack(inputs)
            for i, (token, column, here) in enumerate(self._pieces()):
                if self.cut.halves:
                    within = arith.muli(column, i32(2))
                else:
                    quarter = arith.shrui(arith.andi(column, i32(TILE_K - 1)), i32(2))
                    tile = arith.shrui(column, i32(TILE_K.bit_length() - 1))
                    within = arith.addi(arith.muli(tile, i32(TILE_K)), quarter)
                place = arith.addi(target, arith.addi(arith.muli(token, i32(self.pitch)), within))
                for lane in range(4):
                    swapped = [in_operand_order(words[8 * i + 4 * half + lane]) for half in range(2)]
                    if self.cut.halves:
                        values = [h for w in swapped for h in arithmetic.to_halves(w)]
                        hopper.store_shared(place, values, 16 * lane, here)
                    else:
                        hopper.store_shared(place, swapped, 32 * lane, here)
            return ()

        return cast(Operation, put)

    def barrier(self) -> Operation:
        """``() -> ()``: waits for all threads of the block."""

        @plgpu.inline_mgpu(arg_types=(), return_type=())
        def wait(_: Any) -> Any:
            hopper.block_barrier()
            return ()

        return cast(Operation, wait)

    def _held_inputs(self, held: Any, tile: ir.Value, later: int) -> Callable[[int, int], list[ir.Value]]:
        """The tensor core's second operand: of a tile's u-th 16 inputs and a block of tokens, two registers.

        ``later`` is how many tiles behind that one are meant.
        """
        lane = arith.andi(utils.thread_idx(), i32(31))
        quad, base = arith.andi(lane, i32(3)), hopper.shared_address(held)
        size = 2 if self.cut.halves else 1
        column = arith.addi(
            arith.muli(tile, i32(size * TILE_K)), arith.muli(quad, i32(16 if self.cut.halves else 32))
        )  # fmt: skip
        addresses = []
        for block in range(self.blocks_of_tokens):
            # Lanes of tokens behind the last repeat it; what they compute is not used.
            token = arith.minui(arith.addi(arith.shrui(lane, i32(2)), i32(8 * block)), i32(self.m - 1))
            addresses.append(arith.addi(base, arith.addi(column, arith.muli(token, i32(self.pitch)))))
        offset = later * size * TILE_K
        loaded: dict[int, list[ir.Value]] = {}

        def inputs(u: int, block: int) -> list[ir.Value]:
            if self.cut.halves:
                if u % 2 == 0:
                    loaded[block] = hopper.load_shared(addresses[block], offset + 32 * u)
                return loaded[block][2 * (u % 2) : 2 * (u % 2) + 2]
            if u % 4 == 0:
                loaded[block] = hopper.load_shared(addresses[block], offset + 4 * u)
            return arithmetic.to_halves(loaded[block][u % 4])

        return inputs

    def _of_group(self, group: int) -> range:
        """Its steps of 16 inputs in a tile."""
        steps = TILE_K // 16 // self.groups
        return range(group * steps, (group + 1) * steps)

    def multiply(self, step: int) -> Operation:
        """``(warp, sums, codes, scales, held inputs, first held tile) -> sums``: adds a step's product."""

        @plgpu.inline_mgpu(
            arg_types=(
                self.slots.warp_layout, *(self.layout[name] for name in ("sums", "codes", "scales")),
                plgpu.RefType(), self.scalar,
            ),
            return_type=self.type["sums"],
        )  # fmt: skip
        def add(_: Any, warp: Any, sums: Any, codes: Any, scales: Any, held: Any, first: Any) -> Any:
            _, member = self._in_team(hopper.unpack(warp)[0])
            tile = arith.addi(first.registers.item(), member)
            inputs = self._held_inputs(held, tile, later=step * self.team)
            total, codes, scales = hopper.unpack(sums), hopper.unpack(codes), hopper.unpack(scales)
            for group in range(self.groups):
                part = [[f32(0)] * 4 for _ in range(self.blocks_of_tokens)]
                for u in self._of_group(group):
                    a = decode_to_halves(codes[u])
                    for block in range(self.blocks_of_tokens):
                        part[block] = tensor_core.multiply_tiles(part[block], a, inputs(u, block), "f16")
                pair = decode_scales(scales[group], self.scale_dtype)
                total = [
                    arithmetic.multiply_add(part[block][column + 2 * row], pair[row], total[i])
                    for i, (block, row, column) in enumerate(self._registers())
                ]
            return hopper.pack(total)

        return cast(Operation, add)

    def _registers(self) -> Iterator[tuple[int, int, int]]:
        """Of each of a thread's sums the block of tokens, which of its two outputs and which of its two tokens."""
        return itertools.product(range(self.blocks_of_tokens), range(2), range(self.columns))

    def results_of(self, thread: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
        """The token and the output of each result that a thread adds up."""
        in_team = arith.andi(thread, i32(32 * self.team - 1))
        at = [arith.addi(in_team, i32(i * 32 * self.team)) for i in range(self.results)]
        return [(arith.shrui(i, i32(4)), arith.andi(i, i32(UNIT - 1))) for i in at]

    def load_factors(self, has_token_scales: bool) -> Operation:
        """``([token scales,] *tensor scales) -> factors``: those of a thread's results, or 1, then the weights'."""

        @plgpu.inline_mgpu(
            arg_types=[plgpu.RefType()] * (has_token_scales + len(self.sizes)), return_type=self.type["factors"]
        )
        def load(_: Any, *refs: Any) -> Any:
            token_scales, tensor_scales = refs[:has_token_scales], refs[has_token_scales:]
            factors = [f32(1)] * self.results
            for i, (token, _) in enumerate(self.results_of(utils.thread_idx()) if token_scales else []):
                exists = arith.cmpi(arith.CmpIPredicate.ult, token, i32(self.m))
                factors[i] = load_if(float_address(token_scales[0], token), exists)
            # Not multiplied here: nothing should wait for these loads yet.
            always = hopper.constant(1, bits=1)
            return hopper.pack([*factors, *(load_if(float_address(ref, i32(0)), always) for ref in tensor_scales)])

        return cast(Operation, load)

    def finish(self, has_bias: bool, parts: int, has_residual: bool = False) -> Operation:
        """``(warp, sums, partial, factors, unit, part, [units' sums, turn], [residual], *outputs, *biases) -> ()``.

        Adds up the sums of a team's warps, in their order, and those of the parts before; of the last part, writes y,
        or in bf16 the residual plus that.
        """
        tokens = 8 * self.blocks_of_tokens

        @plgpu.inline_mgpu(
            arg_types=(
                self.slots.warp_layout, self.layout["sums"], plgpu.RefType(), self.layout["factors"],
                *[self.scalar] * 2,
                *([plgpu.RefType(), self.scalar] if parts > 1 else []),
                *[plgpu.RefType()] * (has_residual + len(self.sizes) * (1 + has_bias)),
            ),
            return_type=(),
        )  # fmt: skip
        def write(_: Any, warp: Any, sums: Any, partial: Any, factors: Any, unit: Any, part: Any, *rest: Any) -> Any:
            i64, word, single = ir.IntegerType.get_signless(64), ir.IntegerType.get_signless(32), ir.F32Type.get()
            before, rest = (rest[:2], rest[2:]) if parts > 1 else ((), rest)
            residual, rest = rest[:has_residual], rest[has_residual:]
            thread = utils.thread_idx()
            lane, [warp, _] = arith.andi(thread, i32(31)), hopper.unpack(warp)
            team, _ = self._in_team(warp)
            unit, part = self._unit(unit, team), part.registers.item()
            base = hopper.shared_address(partial)
            row = arith.addi(arith.muli(warp, i32(tokens)), arith.muli(arith.andi(lane, i32(3)), i32(2)))
            column = arith.shrui(lane, i32(2))
            address = arith.addi(base, arith.muli(arith.addi(arith.muli(row, i32(SUMS_PITCH)), column), i32(4)))
            for register, (block, half, token_of_two) in zip(hopper.unpack(sums), self._registers(), strict=True):
                hopper.store_shared(address, [register], 4 * ((8 * block + token_of_two) * SUMS_PITCH + 8 * half))
            results = []
            outputs = self._start(unit, rest[: len(self.sizes)])
            width = self._of_weight(unit, [i32(n) for n in self.sizes])
            biases = self._start(unit, rest[len(self.sizes) :]) if has_bias else None
            first = arith.muli(self._in_weight(unit), i32(UNIT))
            exists = arith.cmpi(arith.CmpIPredicate.ult, unit, i32(self.units))
            for token, output in self.results_of(thread):
                place = arith.addi(first, output)
                here = arith.andi(arith.cmpi(arith.CmpIPredicate.ult, token, i32(self.m)), exists)
                offset_of_output = addend = None
                if biases is not None:
                    address = arith.addi(biases, arith.extui(i64, arith.muli(place, i32(4))))
                    offset_of_output = load_if(address, here)
                index = arith.addi(arith.muli(token, width), place)
                if residual:
                    addend = hopper.load_bf16_if(hopper.global_address(residual[0], 2, (index, 1)), here)
                results.append((token, output, index, here, offset_of_output, addend))
            hopper.asm(f"bar.sync $0, {32 * self.team};", "r", [arith.addi(team, i32(1))], [])
            load = "{{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.f32 $0, 0f00000000; @p ld.shared.f32 $0, [$1+{}]; }}"
            of_tokens, of_weights = hopper.unpack(factors)[: self.results], hopper.unpack(factors)[self.results :]
            of_all = arith.mulf(self._of_weight(unit, of_weights), f32(1 / HALF_CODE_UNIT))

            def add_up(factor: ir.Value, result: tuple[Any, ...]) -> None:
                token, output, index, here, offset_of_output, addend = result
                element = arith.addi(arith.muli(token, i32(SUMS_PITCH)), output)
                of_team = arith.addi(element, arith.muli(team, i32(self.team * SUMS_PITCH * tokens)))
                address = arith.addi(base, arith.muli(of_team, i32(4)))
                flag = arith.extui(word, here)
                values = [
                    hopper.asm(load.format(w * SUMS_PITCH * tokens * 4), "=&f,r,r", [address, flag], [single])[0]
                    for w in range(self.team)
                ]
                total = balanced(values, arith.addf)
                last = here
                if parts > 1:
                    kept, turn = before
                    mine = arith.addi(arith.muli(turn.registers.item(), i32(self.teams)), team)
                    at = arith.addi(arith.muli(mine, i32(SUMS_PITCH * tokens)), element)
                    at = arith.addi(hopper.shared_address(kept), arith.muli(at, i32(4)))
                    later = arith.andi(here, arith.cmpi(arith.CmpIPredicate.ne, part, i32(0)))
                    [sum_before] = hopper.asm(load.format(0), "=&f,r,r", [at, arith.extui(word, later)], [single])
                    total = arith.addf(total, sum_before)
                    hopper.store_shared(at, [total], condition=here)
                    last = arith.andi(here, arith.cmpi(arith.CmpIPredicate.eq, part, i32(parts - 1)))
                y = arith.mulf(total, arith.mulf(factor, of_all))
                if offset_of_output is not None:
                    y = arith.addf(y, offset_of_output)
                if addend is not None:
                    rounded = arith.shli(arithmetic.to_bf16x2(y, f32(0)), i32(16))
                    y = arith.addf(addend, arith.bitcast(single, rounded))
                offset = arith.muli(arith.extui(i64, index), hopper.constant(self.out_size, bits=64))
                store = "cvt.rn.bf16.f32 b, $1; @p st.global.b16 [$0], b;"
                if self.out_size == 4:
                    store = "@p st.global.f32 [$0], $1;"
                hopper.asm(
                    f"{{ .reg .pred p; .reg .b16 b; setp.ne.b32 p, $2, 0; {store} }}", "l,f,r",
                    [arith.addi(outputs, offset), y, arith.extui(word, last)], [],
                )  # fmt: skip

            for factor, result in zip(of_tokens, results, strict=True):
                # Most threads have none, of few tokens, and whole warps are to go on.
                hopper.run_where(result[3], functools.partial(add_up, factor, result))
            return ()

        return cast(Operation, write)


def in_operand_order(word: ir.Value) -> ir.Value:
    """Four e4m3 in the order in which codes come out of their words."""
    return hopper.pure_asm("prmt.b32 $0, $1, 0, 0x3120;", "=r,r", [word], word.type)
