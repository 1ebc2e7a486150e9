"""The register-level steps that round tokens' inputs inside the matvec, :mod:`pallas_kernels.mosaic_matvec`.

Every block needs all of a token's inputs anyway and puts them into its shared memory. Of few tokens it may as well read
them before their rounding: that takes each block a microsecond, while its first weights arrive, instead of a kernel.
"""

from typing import Any, cast

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import arithmetic, hopper
from pallas_kernels.hopper import i32
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.matvec_steps import THREADS, Steps, in_operand_order
from pallas_kernels.row_steps import VECTOR, gated, normalized, rounded_to_e4m3, to_floats
from pallas_kernels.sources import Source, Ungated, Unnormed
from pallas_kernels.tiling import WARPS, rounds_its_input, rows_at_once
from pallas_kernels.weight_layout import TILE_K


class TokenSteps:
    """The steps for one kind of source.

    Of several tokens each is a row of as many neighbouring warps; a thread has every so manieth vector of eight inputs
    of its row. Threads of rows behind the last one hold zeros.
    """

    def __init__(self, steps: Steps, source: Source) -> None:
        # Who chooses the kernel sees to that.
        assert rounds_its_input(steps.cut, steps.m, steps.k, isinstance(source, Ungated))
        self.steps, self.source = steps, source
        # Of each array the bytes of an element, and whether it has a row for every token.
        self.arrays = [(jnp.dtype(array.dtype).itemsize, array.ndim == 2) for array in source.arrays()]
        self.rows = rows_at_once(steps.m)
        self.threads = THREADS // self.rows  # of a row
        self.vectors = -(-steps.held * TILE_K // (VECTOR * self.threads))
        count = sum(self.vectors * VECTOR * size // 4 for size, _ in self.arrays)
        self.layout, self.type = hopper.container_layout(count), hopper.container_type(count, jnp.int32)

    def _row(self) -> ir.Value:
        """A thread's."""
        return arith.divui(utils.thread_idx(), i32(self.threads))

    def _columns(self) -> list[ir.Value]:
        """The first input of each of a thread's vectors."""
        thread = arith.remui(utils.thread_idx(), i32(self.threads))
        return [
            arith.muli(arith.addi(thread, i32(self.threads * vector)), i32(VECTOR)) for vector in range(self.vectors)
        ]  # fmt: skip

    def load(self) -> Operation:
        """``(*arrays of the source) -> words``: a thread's vectors of each, zeros behind the last input."""
        m, k = self.steps.m, self.steps.k

        @plgpu.inline_mgpu(arg_types=[plgpu.RefType()] * len(self.arrays), return_type=self.type)
        def read(_: Any, *refs: Any) -> Any:
            words, row = [], self._row()
            for ref, (size, of_tokens) in zip(refs, self.arrays, strict=True):
                for column in self._columns():
                    exists = arith.cmpi(arith.CmpIPredicate.ult, column, i32(k))
                    index = [(column, 1)]
                    if of_tokens and self.rows > 1:
                        exists = arith.andi(exists, arith.cmpi(arith.CmpIPredicate.ult, row, i32(m)))
                        index.append((row, k))
                    address = hopper.global_address(ref, size, *index)
                    for offset in range(0, VECTOR * size, 16):
                        words += hopper.load_global(4, address, exists, offset, hopper.READ_ONLY)
            return hopper.pack(words)

        return cast(Operation, read)

    def _values(self, words: list[ir.Value]) -> list[list[ir.Value]]:
        """Per array of the source, a thread's inputs in float32."""
        values = []
        for size, _ in self.arrays:
            count = self.vectors * VECTOR * size // 4
            mine, words = words[:count], words[count:]
            values.append(to_floats(mine, size))
        return values

    def hold(self) -> Operation:
        """``(words, factors, held inputs, scratch, other scratch, token scales) -> factors``: rounds and holds tokens.

        Their scales become a part of the factors. Each scratch is a word of shared memory per warp, and so are
        ``token scales``.
        """
        steps = self.steps

        @plgpu.inline_mgpu(
            arg_types=(self.layout, steps.layout["factors"], *[plgpu.RefType()] * 4), return_type=steps.type["factors"]
        )
        def hold(_: Any, words: Any, factors: Any, held: Any, scratch: Any, other: Any, token_scales: Any) -> Any:
            values, *rest = self._values(hopper.unpack(words))
            if isinstance(self.source, Unnormed):
                values = normalized(values, rest[0], steps.k, self.source.eps, scratch, WARPS, self.rows)
            elif isinstance(self.source, Ungated):
                values = gated(values, rest[0])
            packed, scale = rounded_to_e4m3(values, other, WARPS, rows=self.rows)
            row = self._row()
            target = arith.addi(hopper.shared_address(held), arith.muli(row, i32(steps.pitch)))
            exists = arith.cmpi(arith.CmpIPredicate.ult, row, i32(steps.m))
            for column, pair in zip(self._columns(), zip(packed[::2], packed[1::2], strict=True), strict=True):
                # Of each 32 inputs, four and the four that are 16 behind them lie together in float16.
                start = arith.muli(arith.andi(column, i32(~31)), i32(2))
                start = arith.addi(start, arith.muli(arith.andi(column, i32(8)), i32(4)))
                start = arith.addi(start, arith.shrui(arith.andi(column, i32(16)), i32(1)))
                here = arith.cmpi(arith.CmpIPredicate.ult, column, i32(steps.held * TILE_K))
                here = arith.andi(here, exists)
                for i, e4m3 in enumerate(pair):
                    place = arith.addi(target, arith.addi(start, i32(16 * i)))
                    hopper.store_shared(place, arithmetic.to_halves(in_operand_order(e4m3)), condition=here)
            of_weights = hopper.unpack(factors)[steps.results :]
            if self.rows == 1:
                return hopper.pack([scale] * steps.results + of_weights)
            return hopper.pack(self._of_results(scale, token_scales) + of_weights)

        return cast(Operation, hold)

    def _of_results(self, scale: ir.Value, token_scales: Any) -> list[ir.Value]:
        """The scales of the tokens of a thread's results, which other threads have."""
        thread, base = utils.thread_idx(), hopper.shared_address(token_scales)
        of_warp = arith.addi(base, arith.muli(arith.shrui(thread, i32(5)), i32(4)))
        hopper.store_shared(of_warp, [scale])  # the same by all lanes
        hopper.block_barrier()
        scales = []
        for token, _ in self.steps.results_of(thread):
            token = arith.minui(token, i32(self.steps.m - 1))
            place = arith.addi(base, arith.muli(token, i32(4 * WARPS // self.rows)))
            scales.append(arith.bitcast(ir.F32Type.get(), hopper.load_shared(place, words=1)[0]))
        return scales
