"""Times cuts of the INT4 x FP8 product on a Hopper GPU; raw numbers go to docs/results.

    python examples/tune_matmul.py --commit HASH
    python examples/tuning_report.py

The second command makes of them the table that the kernels read (pallas_kernels/tuned). Of each shape and number of
tokens what the rules choose takes part, first, and every candidate's result is compared with the float32 product.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from gpu_times import copies, kernel_times, record
from matmul_benchmark import (
    GROUP_SIZE,
    SCALE_TYPE,
    SHAPES,
    TOLERANCE,
    compiled,
    distance,
    float_product,
    tokens_of,
    weight,
)  # fmt: skip
from tuning_candidates import candidates

from pallas_kernels import to_tiles
from pallas_kernels.tuned import Cut, as_class
from pallas_kernels.weight_layout import share_bytes, tiled_bytes

SHARE = share_bytes(GROUP_SIZE, SCALE_TYPE)
TOKENS = [1, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192]


def try_compile(n: int, k: int, m: int, cut: Cut) -> Any:
    """The compiled product, or None where a cut needs more than the device has."""
    try:
        return compiled(n, k, m, cut)
    except jax.errors.JaxRuntimeError as error:
        print(f"{n}x{k}, {m} tokens, {cut}: {str(error).splitlines()[0]}", flush=True)
        return None


def measure(seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
    began = time.perf_counter()
    one = jnp.float32(1)
    with ThreadPoolExecutor(16) as pool:
        cases = [(n, k, m, candidates(m, n, k, SHARE)) for n, k in SHAPES for m in TOKENS]
        # Compilation goes on while others are timed.
        kernels = [[pool.submit(try_compile, n, k, m, cut) for cut in cuts] for n, k, m, cuts in cases]
        held: tuple[int, int] | None = None
        for (n, k, m, cuts), futures in zip(cases, kernels, strict=True):
            if time.perf_counter() - began > seconds:
                pool.shutdown(wait=False, cancel_futures=True)
                return
            if held != (n, k):
                held = n, k
                pairs = [
                    weight(jax.random.key(i), n, k) for i in range(copies(tiled_bytes(n, k, GROUP_SIZE, SCALE_TYPE)))
                ]
                tiles = [jax.jit(to_tiles)(*pair) for pair in pairs]
            x = tokens_of(m, k)
            expected = float_product(x, *pairs[0])
            calls, errors = {}, {}
            for i, future in enumerate(futures):
                if (kernel := future.result()) is None:
                    continue
                errors[i] = distance(kernel(x, tiles[0], one), expected)
                if not errors[i] <= TOLERANCE:
                    raise SystemExit(f"{n}x{k}, {m} tokens, {cuts[i]}: error {errors[i]}")

                def call(turn: int, kernel: Any = kernel, x: Any = x, tiles: Any = tiles) -> Any:
                    return kernel(x, tiles[turn % len(tiles)], one)

                calls[str(i)] = call
            times = kernel_times(calls)
            tried = [
                {"microseconds": us, "error": errors[int(i)], **as_class((n, k, SHARE), m, cuts[int(i)])}
                for i, us in times.items()
            ]
            best = min(tried, key=lambda row: row["microseconds"])
            print(n, k, m, f"{tried[0]['microseconds']:.1f} by rule, {best['microseconds']:.1f}:", best, flush=True)
            yield "products", {"n": n, "k": k, "m": m, "tried": tried}


def main() -> None:
    about = {"group_size": GROUP_SIZE, "scales": jnp.dtype(SCALE_TYPE).name, "products": []}
    record(__file__, __doc__, "tuning", about, measure)


if __name__ == "__main__":
    main()
