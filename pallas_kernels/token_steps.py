"""The register-level steps that round a token's inputs inside the matvec, :mod:`pallas_kernels.mosaic_matvec`.

Every block needs all of a token's inputs anyway and puts them into its shared memory. For one token it may as well read
them before their rounding: that takes each block a microsecond, while its first weights arrive, instead of a kernel.
"""

from typing import Any, cast

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import hopper
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.matvec_steps import Steps
from pallas_kernels.row_steps import from_bf16x2, gated, normalized, rounded_to_e4m3
from pallas_kernels.sources import Source, Ungated, Unnormed
from pallas_kernels.tiling import PIECE, WARPS


class TokenSteps:
    """The steps for one kind of source; each thread holds a piece of 32 inputs, or none."""

    def __init__(self, steps: Steps, source: Source) -> None:
        assert (steps.m, steps.pieces) == (1, 1)  # who chooses the kernel sees to that
        self.steps, self.source = steps, source
        self.sizes = [jnp.dtype(array.dtype).itemsize for array in source.arrays()]
        count = sum(PIECE * size // 4 for size in self.sizes)
        self.layout, self.type = hopper.container_layout(count), hopper.container_type(count, jnp.int32)

    def load(self) -> Operation:
        """``(*arrays of the source) -> words``: a thread's piece of each."""

        @plgpu.inline_mgpu(arg_types=[plgpu.RefType()] * len(self.sizes), return_type=self.type)
        def read(_: Any, *refs: Any) -> Any:
            word, words = ir.IntegerType.get_signless(32), []
            [(_, column, here)] = self.steps.pieces_of_thread()
            inside = arith.andi(here, arith.cmpi(arith.CmpIPredicate.ult, column, hopper.i32(self.steps.k)))
            for ref, size in zip(refs, self.sizes, strict=True):
                address = hopper.global_address(ref, size, (column, 1))
                for offset in range(0, PIECE * size, 16):
                    words += hopper.asm(
                        "{ .reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; "
                        f"mov.b32 $3, 0; @p ld.global.nc.v4.u32 {{$0, $1, $2, $3}}, [$4+{offset}]; }}",
                        "=&r,=&r,=&r,=&r,l,r", [address, arith.extui(word, inside)], [word] * 4,
                    )  # fmt: skip
            return hopper.pack(words)

        return cast(Operation, read)

    def _values(self, words: list[ir.Value]) -> list[list[ir.Value]]:
        """Per array of the source, a thread's piece in float32."""
        values = []
        for size in self.sizes:
            piece, words = words[: PIECE * size // 4], words[PIECE * size // 4 :]
            if size == 4:
                values.append([arith.bitcast(ir.F32Type.get(), w) for w in piece])
            else:
                values.append([value for w in piece for value in from_bf16x2(w)])
        return values

    def round(self) -> Operation:
        """``(words, factors, scratch, other scratch) -> (inputs, factors)``: e4m3, their scale among the factors.

        Each scratch is a word of shared memory per warp.
        """
        steps = self.steps

        @plgpu.inline_mgpu(
            arg_types=(self.layout, steps.layout["factors"], plgpu.RefType(), plgpu.RefType()),
            return_type=(steps.type["inputs"], steps.type["factors"]),
        )
        def convert(_: Any, words: Any, factors: Any, scratch: Any, other: Any) -> Any:
            values, *rest = self._values(hopper.unpack(words))
            if isinstance(self.source, Unnormed):
                values = normalized(values, rest[0], steps.k, self.source.eps, scratch, WARPS)
            elif isinstance(self.source, Ungated):
                values = gated(values, rest[0])
            packed, scale = rounded_to_e4m3(values, other, WARPS)
            of_weights = hopper.unpack(factors)[steps.results :]
            return hopper.pack(packed), hopper.pack([scale] * steps.results + of_weights)

        return cast(Operation, convert)
