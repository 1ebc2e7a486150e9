"""Times of kernels on a GPU, of JAX and torch alike, and the memory's bandwidth."""

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import torch

# The one way to time kernels of both frameworks alike; jax.experimental.mosaic.gpu.profiler uses it for JAX functions.
from jax._src.lib import mosaic_gpu as mosaic_gpu_library
from pages import RESULTS, result_file

from convert.folder import write_json
from pallas_kernels.tuned import device_name

L2_BYTES = 50 << 20
ROUNDS, ITERATIONS = 2, 8

Candidate = Callable[[int], Any]


def copies(bytes_of_one: int) -> int:
    """How many of an input must take turns, so that none is found in the L2 cache."""
    return max(1, min(12, 2 * L2_BYTES // bytes_of_one + 1))


def kernel_times(candidates: dict[str, Candidate]) -> dict[str, float]:
    """Microseconds of kernels per call, the median over rounds in which the candidates take turns.

    A session of the timer takes half a second to begin, so one serves all candidates; a kernel that none of them
    launches marks the end of each one's turn.
    """
    timer, mark = mosaic_gpu_library._mosaic_gpu_ext, torch.ones(1, device="cuda")
    for call in candidates.values():
        jax.block_until_ready(call(0))
    torch.floor(mark)
    torch.cuda.synchronize()
    timer._cupti_init()
    for _ in range(ROUNDS):
        for call in candidates.values():
            jax.block_until_ready([call(i) for i in range(ITERATIONS)])
            torch.cuda.synchronize()
            torch.floor(mark)
            torch.cuda.synchronize()
    turns: list[list[float]] = [[]]
    for kernel, ms in timer._cupti_get_timings(True):
        if "floor" in kernel:
            turns.append([])
        else:
            turns[-1].append(ms)
    if len(turns) != ROUNDS * len(candidates) + 1 or not all(turns[:-1]):
        raise RuntimeError(f"{len(turns) - 1} turns were marked, of {ROUNDS} rounds of {len(candidates)} candidates")
    return {
        name: statistics.median(sum(turn) for turn in turns[i : -1 : len(candidates)]) / ITERATIONS * 1e3
        for i, name in enumerate(candidates)
    }


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of an elementwise pass over a gigabyte."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * 4 * 2**28 / kernel_times({"copy": lambda _: torch.neg(source, out=target)})["copy"] * 1e6


def record(
    script: str, doc: str, name: str, about: dict[str, Any],
    measure: Callable[[float], Iterator[tuple[str, dict[str, Any]]]],
) -> None:  # fmt: skip
    """The command line of a benchmark: writes what ``measure`` yields, a row and the name of its list, as it comes.

    Unless told otherwise, to docs/results, under the benchmark's name and the device's.
    ``measure`` gets the seconds behind which it is to begin nothing more; a run that is cut off leaves what it has.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=result_file, help="in docs/results, by benchmark and device, if not given")
    parser.add_argument("--commit", required=True, help="to record")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing more after this time")
    args = parser.parse_args()
    device = torch.cuda.get_device_name()
    target = args.out or RESULTS / f"{name}-{device_name(device)}.json"
    results: dict[str, Any] = {
        "command": f"python examples/{Path(script).name}",
        "commit": args.commit,
        **about,
        "device": device,
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "cuda": torch.version.cuda},
        "copy_bytes_per_second": copy_bandwidth(),
    }
    for part, row in measure(args.seconds):
        results[part].append(row)
        write_json(target, results)
