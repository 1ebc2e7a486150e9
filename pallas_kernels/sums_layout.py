"""How a warpgroup's sums of the matmul lie in memory where other warpgroups add them to their own.

Registers come in vectors, and vectors of one number of all threads come one behind another: so a warp's accesses are of
neighbouring bytes.
"""

from collections.abc import Iterator, Sequence

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import hopper
from pallas_kernels.hopper import i32


def vector_words(registers: int) -> int:
    """Of a thread's sums, of so many registers: as many as all vectors can have."""
    return 4 if registers % 4 == 0 else 2


def bytes_of_half(registers: int) -> int:
    """Of a warpgroup's sums of a half, of which each thread has so many registers."""
    return registers * 4 * hopper.WARPGROUP


def place_of_thread(registers: int) -> ir.Value:
    """Where a thread's first vector is, in bytes."""
    return arith.muli(hopper.thread_in_warpgroup(), i32(4 * vector_words(registers)))


def vectors(registers: Sequence[ir.Value]) -> Iterator[tuple[int, Sequence[ir.Value]]]:
    """A thread's vectors, with how many bytes each is behind the first one."""
    words = vector_words(len(registers))
    for i in range(0, len(registers), words):
        yield bytes_of_half(i), registers[i : i + words]
