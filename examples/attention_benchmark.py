"""Times attention on a Hopper GPU beside cuDNN's through JAX; raw numbers go to docs/results.

    python examples/attention_benchmark.py --commit HASH
    uv run --group plots python examples/attention_report.py

Prompts: e4m3 queries, keys and values beside cuDNN in bf16 and fp8, and what makes them of the projections beside the
time that its bytes need; compared with float32 attention of the unrounded inputs, whose keys have channels of large
magnitude. Decoding: a token per sequence over the int4 cache, beside cuDNN over one in bf16; compared with float32
attention of the same roundings. Times are sums of the kernels' own times (CUPTI).
"""

import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# Of what is timed XLA has nothing to tune, and tuning what is compared with takes long.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"

import jax
import jax.numpy as jnp
from gpu_times import Candidate, copies, kernel_times, record

# The only way to cuDNN's fp8 attention; jax.nn.dot_product_attention does not offer it.
from jax._src.cudnn import fused_attention_stablehlo as cudnn

import pallas_kernels as pk
from pallas_kernels.reference_rotation import Cache

E4M3, BF16 = jnp.float8_e4m3fn, jnp.bfloat16


class Heads(NamedTuple):
    """Query heads, key/value heads and their size."""

    query: int
    kv: int
    size: int


LLAMA_3, SMALL, LLAMA_2 = Heads(32, 8, 128), Heads(32, 8, 64), Heads(32, 32, 128)
PROMPTS = [
    *((LLAMA_3, 1, tokens) for tokens in (1024, 2048, 4096, 8192, 16384)),
    *((LLAMA_3, 16, tokens) for tokens in (1024, 2048, 4096)),
    (SMALL, 1, 4096), (SMALL, 16, 1024), (SMALL, 16, 4096), (LLAMA_2, 4, 2048),
]  # fmt: skip
DECODING = [
    *((LLAMA_3, batch, slots) for batch in (1, 16, 64) for slots in (4096, 16384)),
    (LLAMA_3, 1, 131072), (LLAMA_3, 256, 1024), (SMALL, 16, 4096), (LLAMA_2, 16, 4096),
]  # fmt: skip
LARGEST_BF16_CACHE = 24 << 30


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def inputs(heads: Heads, batch: int, tokens: int) -> tuple[jax.Array, ...]:
    """Queries, keys and values ``[b, t, heads, d]`` in bf16.

    Two channels of a key are large and one is far from 0; channels of values have means, so that sums over many do not
    vanish.
    """
    a, b, c, e = jax.random.split(jax.random.key(tokens), 4)
    shape = (batch, tokens, heads.kv, heads.size)
    keys = jax.random.normal(b, shape).at[..., 3].mul(8).at[..., 17].mul(4).at[..., 40].add(6)
    queries = jax.random.normal(a, (batch, tokens, heads.query, heads.size))
    values = jax.random.normal(c, shape) + jax.random.normal(e, (heads.kv, heads.size)) / 2
    return queries.astype(BF16), keys.astype(BF16), values.astype(BF16)


@jax.jit
def float_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal, of one sequence, in float32, a head at a time."""
    t, heads, d = q.shape
    group = heads // k.shape[1]

    def one(head: jax.Array) -> jax.Array:
        mine = [x[:, i].astype(jnp.float32) for x, i in ((q, head), (k, head // group), (v, head // group))]
        scores = jnp.matmul(mine[0], mine[1].T, precision="highest") * d**-0.5
        # Of the last queries when there are fewer of them than keys.
        scores = jnp.where(jnp.tri(t, len(k), len(k) - t, dtype=bool), scores, -jnp.inf)
        return jnp.matmul(jax.nn.softmax(scores, axis=-1), mine[2], precision="highest")

    return jax.lax.map(one, jnp.arange(heads)).swapaxes(0, 1)


@jax.jit
def distances(y: jax.Array, expected: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Relative Frobenius distance, and that of the worst row."""
    error = jnp.linalg.norm(y.astype(jnp.float32) - expected, axis=-1)
    size = jnp.linalg.norm(expected, axis=-1)
    return jnp.linalg.norm(error) / jnp.linalg.norm(size), jnp.max(error / size)


def found(y: jax.Array, expected: jax.Array) -> dict[str, float]:
    overall, worst = distances(y, expected)
    return {"overall": float(overall), "worst_row": float(worst)}


def cudnn_bf16(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")


def cudnn_fp8(q8: jax.Array, k8: jax.Array, v8: jax.Array, factors: dict[str, jax.Array]) -> jax.Array:
    y, _, _ = cudnn.dot_product_attention(
        q8, k8, v8, scale=q8.shape[-1] ** -0.5, mask_type=cudnn.MaskType.CAUSAL, use_fp8=True, fp8_params=factors
    )
    return y


@jax.jit
def for_cudnn_fp8(arrays: tuple[jax.Array, ...], peak: jax.Array) -> tuple[list[jax.Array], dict[str, jax.Array]]:
    """Inputs in e4m3 with a scale per tensor, and those scales. ``peak`` is the result's largest magnitude."""
    rounded, factors = [], {name: jnp.ones((1, 1, 1, 1)) for name in cudnn.fp8_params_keys}
    for name, x in zip("qkv", arrays, strict=True):
        scale = jnp.max(jnp.abs(x.astype(jnp.float32))) / 448
        rounded.append((x.astype(jnp.float32) / scale).astype(E4M3))
        factors[f"descale_{name}"] *= scale
    factors["scale_s"] *= 256  # of weights relative to the largest
    factors["descale_s"] /= 256
    factors["scale_o"] *= 448 / peak
    return rounded, factors


def rotations(batch: int, tokens: int, size: int) -> tuple[jax.Array, jax.Array]:
    angles = jnp.arange(tokens)[:, None] / 5e5 ** (jnp.arange(size // 2) / (size // 2))
    angles = jnp.broadcast_to(angles[:, None], (batch, tokens, 1, size // 2))
    return jnp.cos(angles), jnp.sin(angles)


def empty_cache(heads: Heads, batch: int, tokens: int) -> Cache:
    rows = (batch, heads.kv, tokens)

    def half() -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((*rows, heads.size // 2), jnp.uint8), jnp.zeros(rows, BF16)

    return (*half(), *half())


def rounding_bytes(heads: Heads, tokens: int) -> int:
    """That the kernel before attention must read and write: bf16 in, e4m3 and int4 out, angles and scales."""
    new = heads.query * (3 * heads.size + 4) + 2 * heads.kv * (3 * heads.size + heads.size // 2 + 2)
    return tokens * (new + 4 * heads.size)


def prompt_case(heads: Heads, batch: int, tokens: int) -> dict[str, Any]:
    q, k, v = inputs(heads, batch, tokens)
    q8, q_scale = jax.jit(functools.partial(pk.quantize_fp8, largest=pk.QUERY_MAX))(q)
    (k8, k_scale), (v8, v_scale) = (
        jax.jit(pk.quantize_blocks)(x, largest) for x, largest in ((k, pk.KEY_MAX), (v, pk.E4M3_MAX))
    )
    lengths = jnp.full(batch, tokens, jnp.int32)
    arguments = (q8, q_scale, k8, k_scale, jax.jit(pk.transpose_values)(v8), v_scale, lengths)
    attend = jax.jit(functools.partial(pk.prefill_attention, softmax_scale=heads.size**-0.5))
    baseline = jax.jit(functools.partial(cudnn_bf16, causal=True))
    expected = float_attention(q[0], k[0], v[0])
    rounded, factors = for_cudnn_fp8((q, k, v), jnp.max(jnp.abs(expected)))
    calls: dict[str, Candidate] = {
        "fireq": lambda _: attend(*arguments),
        "cudnn bf16": lambda _: baseline(q, k, v),
    }
    errors = {name: found(call(0)[0], expected) for name, call in calls.items()}
    refused = None
    try:
        attend8 = jax.jit(cudnn_fp8)
        y8 = attend8(*rounded, factors)[0].astype(jnp.float32) / factors["scale_o"].reshape(())
        errors["cudnn fp8"] = found(y8, expected)
        calls["cudnn fp8"] = lambda _: attend8(*rounded, factors)
    except (RuntimeError, ValueError) as error:
        refused = str(error).splitlines()[0]
    starts, angles = jnp.zeros(batch, jnp.int32), rotations(batch, tokens, heads.size)
    # The cache is donated, as it is in the model; the kernel then writes it in place.
    rounding = jax.jit(pk.rotate_and_round, donate_argnums=5)
    cache = empty_cache(heads, batch, tokens)

    def before(_: int, **tables: jax.Array) -> Any:
        nonlocal cache
        prompt, cache = rounding(q, k, v, *angles, cache, starts, lengths, **tables)
        return prompt

    calls["rotate and round"] = before
    per_channel = jnp.ones((heads.kv, heads.size))
    calls["rotate, scale and round"] = functools.partial(before, scale=per_channel)
    calls["rotate, scale, mix and round"] = functools.partial(before, scale=per_channel, key_offset=per_channel)
    return {
        **heads._asdict(), "batch": batch, "tokens": tokens, "microseconds": kernel_times(calls), "errors": errors,
        "rounding_bytes": rounding_bytes(heads, batch * tokens), "cudnn_fp8_refused": refused,
    }  # fmt: skip


def decode_case(heads: Heads, batch: int, slots: int) -> dict[str, Any]:
    q, k, v = inputs(heads, 1, slots)
    q8, q_scale = jax.jit(pk.quantize_fp8)(jnp.repeat(q[:, -1:], batch, axis=0))
    parts = [part for x in (k, v) for part in jax.jit(pk.quantize_kv)(x.astype(jnp.float32).swapaxes(1, 2))]
    int4_bytes = batch * sum(part.nbytes for part in parts)
    query = q8.astype(jnp.float32) * q_scale[..., None]
    keys, values = (pk.dequantize_int4(parts[i], parts[i + 1][..., None]).swapaxes(1, 2) for i in (0, 2))
    positions = jnp.full((batch, 1), slots - 1, jnp.int32)

    def repeated(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, batch, axis=0)

    caches = [[repeated(part) for part in parts] for _ in range(copies(int4_bytes))]
    attend = jax.jit(functools.partial(pk.decode_attention, softmax_scale=heads.size**-0.5))
    calls: dict[str, Candidate] = {"fireq": lambda i: attend(q8, q_scale, *caches[i % len(caches)], positions)}
    bf16_bytes = batch * (k.nbytes + v.nbytes)
    if bf16_bytes <= LARGEST_BF16_CACHE:
        new = query.astype(BF16)
        floats = [(repeated(keys.astype(BF16)), repeated(values.astype(BF16))) for _ in range(copies(bf16_bytes))]
        baseline = jax.jit(functools.partial(cudnn_bf16, causal=False))
        calls["cudnn bf16"] = lambda i: baseline(new, *floats[i % len(floats)])
    expected = float_attention(query[0], keys[0], values[0])
    errors = {name: found(call(0)[0], expected) for name, call in calls.items()}
    return {
        **heads._asdict(), "batch": batch, "slots": slots, "microseconds": kernel_times(calls), "errors": errors,
        "int4_bytes": int4_bytes, "bf16_bytes": bf16_bytes,
    }  # fmt: skip


# Of prompts the roundings to e4m3 (about 0.026 per operand); of decoding those of weights and results to bf16.
LARGEST_ERROR = {"prompts": 0.05, "decoding": 1e-2}


def measure(seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
    began = time.perf_counter()
    parts: list[tuple[str, Callable[..., dict[str, Any]], list[Any]]] = [
        ("prompts", prompt_case, PROMPTS), ("decoding", decode_case, DECODING),
    ]  # fmt: skip
    for part, case_of, cases in parts:
        for case in cases:
            if time.perf_counter() - began > seconds:
                return
            row = case_of(*case)
            error = row["errors"]["fireq"]["overall"]
            if not error <= LARGEST_ERROR[part]:
                raise SystemExit(f"{part} {case}: error {error}")
            print(f"{time.perf_counter() - began:.0f} s", part, row, flush=True)
            yield part, row


def main() -> None:
    record(__file__, __doc__, "attention", {"prompts": [], "decoding": []}, measure)


if __name__ == "__main__":
    main()
