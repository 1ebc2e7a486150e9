"""Times the INT4 x FP8 product on a Hopper GPU beside cuBLASLt; raw numbers go to docs/results.

    python examples/matmul_benchmark.py --commit HASH
    uv run --group plots python examples/matmul_report.py

Every shape is checked against the float32 product first. Times are the sums of the kernels' own times (CUPTI), the
median over rounds in which the candidates take turns; weights are rotated past the L2 cache. Where the package
humming-kernels is installed, its W4A8 product (int4 weights, a bf16 scale per group, e4m3 activations) takes part, too.
"""

import copy
import functools
import importlib.util
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import torch
from gpu_times import Candidate, copies, kernel_times, record

from pallas_kernels import int4_fp8_matmul_tiled, pack_int4, to_tiles, unpack_int4
from pallas_kernels.tiling import choose_streaming, choose_tiling
from pallas_kernels.weight_layout import SHARES, share_bytes, tiled_bytes, tiles_shape

# n x k of Llama-3-8B's qkv, o, gate and up, down, and of Llama-2-7B's feed-forward layers.
SHAPES = [(28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]
TOKENS = [1, 4, 16, 64, 256, 1024, 4096, 8192]
GROUP_SIZE, SCALE_TYPE, E4M3 = 128, jnp.float8_e4m3fn, jnp.float8_e4m3fn
TOLERANCE = 4e-3
# To the product of the weights before they were rounded to int4, which moves it by 0.11.
ROUNDED_TOLERANCE = 0.13


def weight(key: jax.Array, n: int, k: int) -> tuple[jax.Array, jax.Array]:
    a, b, c = jax.random.split(key, 3)
    scales = jnp.exp(0.4 * jax.random.normal(a, (n, k // GROUP_SIZE)))
    scales = jnp.where(jax.random.bernoulli(b, 0.3, scales.shape), -scales, scales).astype(SCALE_TYPE)
    return pack_int4(jax.random.randint(c, (n, k), -8, 8, jnp.int8)), scales


@functools.partial(jax.jit, static_argnums=(0, 1))
def tokens_of(m: int, k: int) -> tuple[jax.Array, jax.Array]:
    """e4m3 activations and their scales."""
    x = jnp.clip(60 * jax.random.normal(jax.random.key(m), (m, k)), -448, 448).astype(E4M3)
    return x, jax.random.uniform(jax.random.key(m + 1), (m,), minval=0.5, maxval=2)


@jax.jit
def error(y: jax.Array, x: jax.Array, x_scale: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
    """Relative Frobenius error to the float32 product of the same inputs."""
    w = unpack_int4(codes).astype(jnp.float32)
    w = (w.reshape(*scales.shape, -1) * scales.astype(jnp.float32)[..., None]).reshape(w.shape)
    expected = jnp.matmul(x.astype(jnp.float32), w.T, precision="highest") * x_scale[:, None]
    return jnp.linalg.norm(y.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)


def compiled(n: int, k: int, m: int) -> tuple[Any, Any, Any]:
    """The kernel, and what compares its result with the float32 product and with another result."""
    product = functools.partial(int4_fp8_matmul_tiled, n=n, group_size=GROUP_SIZE, scale_dtype=SCALE_TYPE)
    shape = jax.ShapeDtypeStruct
    tiles = shape(tiles_shape(n, k, GROUP_SIZE, SCALE_TYPE), jnp.int32)
    x, x_scale = jax.eval_shape(lambda: tokens_of(m, k))
    kernel = jax.jit(product).lower(x, x_scale, tiles, shape((), jnp.float32)).compile()
    pair = shape((n, k // 2), jnp.uint8), shape((n, k // GROUP_SIZE), SCALE_TYPE)
    y = shape((m, n), jnp.bfloat16)
    return kernel, error.lower(y, x, x_scale, *pair).compile(), jax.jit(jnp.array_equal).lower(y, y).compile()


def chosen(m: int, n: int, k: int) -> dict[str, Any]:
    """Which kernel runs, and how it cuts the product."""
    share = share_bytes(GROUP_SIZE, SCALE_TYPE)
    streaming = choose_streaming(m, n, k, share)
    if streaming is not None:
        return {"kernel": "matvec", **vars(streaming)}
    return {"kernel": "matmul", **vars(choose_tiling(m, n, k, SHARES * share))}


def torch_weights(n: int, k: int) -> tuple[list[Any], list[Any]]:
    """In bf16 and in e4m3."""
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies(n * k))]
    return weights[: copies(2 * n * k)], [w.to(torch.float8_e4m3fn) for w in weights]


def torch_candidates(m: int, weights: list[Any], weights8: list[Any]) -> dict[str, Candidate]:
    """Torch, that is cuBLASLt: bf16, and fp8 with a scale per tensor or row, both ways of accumulating."""
    n, k = weights[0].shape
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    result: dict[str, Candidate] = {"bf16": lambda i: torch.matmul(x, weights[i % len(weights)].t())}
    if m % 16:
        return result
    x8 = x.to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    rows, columns = torch.ones(m, 1, device="cuda"), torch.ones(1, n, device="cuda")
    for name, a, b in (("fp8 per tensor", one, one), ("fp8 per row", rows, columns)):
        for fast in (False, True):

            def call(i: int, a: Any = a, b: Any = b, fast: bool = fast) -> Any:
                w = weights8[i % len(weights8)].t()
                return torch._scaled_mm(x8, w, scale_a=a, scale_b=b, out_dtype=torch.bfloat16, use_fast_accum=fast)

            result[name + (", fast" if fast else "")] = call
    return result


def humming_layer(n: int, k: int) -> Any:
    """A layer of humming-kernels, which compiles its kernels at the first call; checked."""
    from humming.layer import HummingLayer

    layer = HummingLayer(
        shape_n=n, shape_k=k, weight_config={"dtype": "int4", "group_size": GROUP_SIZE},
        input_config={"dtype": "float8e4m3"}, torch_dtype=torch.bfloat16,
    ).cuda()  # fmt: skip
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    layer.load_from_unquantized(weight)
    layer.transform()
    for m in TOKENS:
        x = torch.randn(m, k, device="cuda").to(torch.float8_e4m3fn)
        expected = torch.matmul(x.to(torch.bfloat16), weight.t()).float()
        y = layer(inputs=x, input_scale=torch.ones(m, 1, device="cuda")).float()
        if not (found := float((y - expected).norm() / expected.norm())) <= ROUNDED_TOLERANCE:
            raise SystemExit(f"humming-kernels, {n}x{k}, {m} tokens: error {found}")
    return layer


def humming_candidate(m: int, layers: list[Any]) -> Candidate:
    """The W4A8 product of humming-kernels, with tokens and their scales given."""
    x = torch.randn(m, layers[0].shape_k, device="cuda").to(torch.float8_e4m3fn)
    scales = torch.ones(m, 1, device="cuda")
    return lambda i: layers[i % len(layers)](inputs=x, input_scale=scales)


def measure(seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
    began = time.perf_counter()
    cases = [(n, k, m) for n, k in SHAPES for m in TOKENS]
    with ThreadPoolExecutor(16) as pool:
        shapes = SHAPES if importlib.util.find_spec("humming") is not None else []
        humming = pool.map(lambda shape: humming_layer(*shape), shapes)  # at the same time
        kernels = dict(zip(cases, pool.map(lambda case: compiled(*case), cases), strict=True))
        layers = dict(zip(shapes, humming, strict=True))
    print(f"compiled after {time.perf_counter() - began:.0f} s", flush=True)
    one = jnp.float32(1)
    for n, k in SHAPES:
        if time.perf_counter() - began > seconds:
            return
        bytes_read = tiled_bytes(n, k, GROUP_SIZE, SCALE_TYPE)
        pairs = [weight(jax.random.key(i), n, k) for i in range(copies(bytes_read))]
        tiles = [jax.jit(to_tiles)(*pair) for pair in pairs]
        others = torch_weights(n, k)
        of_humming = [copy.deepcopy(layers[n, k]) for _ in range(copies(n * k // 2))] if layers else []
        for m in TOKENS:
            kernel, error_of, are_equal = kernels[n, k, m]
            x, x_scale = tokens_of(m, k)
            y = kernel(x, x_scale, tiles[0], one)
            found = float(error_of(y, x, x_scale, *pairs[0]))
            same = all(bool(are_equal(y, kernel(x, x_scale, tiles[0], one))) for _ in range(20))
            if not (found <= TOLERANCE and same):
                raise SystemExit(f"{n}x{k}, {m} tokens: error {found}, repeatable: {same}")

            def ours(i: int, kernel: Any = kernel, x: Any = x, x_scale: Any = x_scale, tiles: Any = tiles) -> Any:
                return kernel(x, x_scale, tiles[i % len(tiles)], one)

            candidates = {"int4": ours, **torch_candidates(m, *others)}
            if of_humming:
                candidates["humming"] = humming_candidate(m, of_humming)
            times = kernel_times(candidates)
            print(n, k, m, f"error {found:.2e}", {name: round(us, 1) for name, us in times.items()}, flush=True)
            yield (
                "rows",
                {
                    "n": n, "k": k, "m": m, "error": found, "weight_bytes": bytes_read, "microseconds": times,
                    "cut": chosen(m, n, k),
                },
            )  # fmt: skip
        del others, of_humming
        torch.cuda.empty_cache()


def main() -> None:
    about: dict[str, Any] = {"group_size": GROUP_SIZE, "scales": jnp.dtype(SCALE_TYPE).name, "rows": []}
    if importlib.util.find_spec("humming") is not None:
        about["humming-kernels"] = version("humming-kernels")
    record(__file__, __doc__, "matmul", about, measure)


if __name__ == "__main__":
    main()
