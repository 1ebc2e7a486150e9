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
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import torch
from gpu_times import Candidate, copies, kernel_times, record

from pallas_kernels import Rounded, TiledWeight, int4_matmuls_tiled, pack_int4, to_tiles
from pallas_kernels.mosaic_matmul import matmul
from pallas_kernels.mosaic_matvec import matvec
from pallas_kernels.tiling import FLAGS, Streaming
from pallas_kernels.tuned import Cut, choose_cut, kernel_of
from pallas_kernels.weight_layout import share_bytes, tiled_bytes, tiles_shape

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
def tokens_of(m: int, k: int) -> Rounded:
    """e4m3 activations, their scales, and flags, as a kernel that rounds makes them."""
    x = jnp.clip(60 * jax.random.normal(jax.random.key(m), (m, k)), -448, 448).astype(E4M3)
    scales = jax.random.uniform(jax.random.key(m + 1), (m,), minval=0.5, maxval=2)
    return Rounded(x, scales, jnp.zeros((FLAGS,), jnp.int32))


def as_torch(array: jax.Array) -> torch.Tensor:
    """The same memory in torch; of e4m3 its bytes are handed over."""
    if array.dtype == E4M3:
        return torch.from_dlpack(jax.lax.bitcast_convert_type(array, jnp.uint8)).view(torch.float8_e4m3fn)
    return torch.from_dlpack(array)


def float_product(x: Rounded, codes: jax.Array, scales: jax.Array) -> torch.Tensor:
    """Of the same inputs in float32, by torch, which need not compile it."""
    tokens, factors, packed, of_groups = map(as_torch, jax.block_until_ready((x.values, x.scale, codes, scales)))
    nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).to(torch.float32)
    values = torch.where(nibbles > 7, nibbles - 16, nibbles).unflatten(1, (scales.shape[1], -1))
    w = (values * of_groups.float().unsqueeze(-1)).flatten(1)
    product = torch.matmul(tokens.float(), w.t()) * factors.unsqueeze(1)
    torch.cuda.synchronize()  # before JAX may use the memory of what was handed over for something else
    return product


def distance(y: jax.Array, expected: torch.Tensor) -> float:
    """Relative Frobenius norm."""
    return float((as_torch(jax.block_until_ready(y)).float() - expected).norm() / expected.norm())


def are_equal(a: jax.Array, b: jax.Array) -> bool:
    """Bit for bit, but for the sign of 0."""
    return torch.equal(*map(as_torch, jax.block_until_ready((a, b))))


def compiled(n: int, k: int, m: int, cut: Cut | None = None) -> Any:
    """See :func:`product`."""
    shape = jax.ShapeDtypeStruct
    tiles = shape(tiles_shape(n, k, GROUP_SIZE, SCALE_TYPE), jnp.int32)
    x = jax.eval_shape(lambda: tokens_of(m, k))
    return jax.jit(functools.partial(product, n=n, cut=cut)).lower(x, tiles, shape((), jnp.float32)).compile()


def product(x: Rounded, tiles: jax.Array, tensor_scale: jax.Array, *, n: int, cut: Cut | None = None) -> jax.Array:
    """As the library chooses, or with the given cut by the kernel that it belongs to."""
    options: dict[str, Any] = {"group_size": GROUP_SIZE, "scale_dtype": SCALE_TYPE}
    weight = [tiles], [tensor_scale], [None]
    if cut is None:
        [y] = int4_matmuls_tiled(x, [TiledWeight(tiles, tensor_scale, None, n)], **options)
    elif isinstance(cut, Streaming):
        [y] = matvec(x, *weight, sizes=(n,), cut=cut, **options)
    else:
        [y] = matmul(x.values, x.scale, *weight, None, x.flags, sizes=(n,), tiling=cut, **options)
    return y


def chosen(m: int, n: int, k: int) -> Cut:
    """How the library cuts a product, and by which kernel."""
    return choose_cut(m, n, k, share_bytes(GROUP_SIZE, SCALE_TYPE))


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
            kernel = kernels[n, k, m]
            x = tokens_of(m, k)
            y = kernel(x, tiles[0], one)
            found = distance(y, float_product(x, *pairs[0]))
            same = all(are_equal(y, kernel(x, tiles[0], one)) for _ in range(20))
            if not (found <= TOLERANCE and same):
                raise SystemExit(f"{n}x{k}, {m} tokens: error {found}, repeatable: {same}")

            def ours(i: int, kernel: Any = kernel, x: Any = x, tiles: Any = tiles) -> Any:
                return kernel(x, tiles[i % len(tiles)], one)

            candidates = {"int4": ours, **torch_candidates(m, *others)}
            if of_humming:
                candidates["humming"] = humming_candidate(m, of_humming)
            times = kernel_times(candidates)
            print(n, k, m, f"error {found:.2e}", {name: round(us, 1) for name, us in times.items()}, flush=True)
            yield (
                "rows",
                {
                    "n": n, "k": k, "m": m, "error": found, "weight_bytes": bytes_read, "microseconds": times,
                    "cut": {"kernel": kernel_of(cut := chosen(m, n, k)), **asdict(cut)},
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
