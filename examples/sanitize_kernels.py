"""Runs every kernel on small shapes under compute-sanitizer; the verdicts go to docs/results/sanitizer.json.

python examples/sanitize_kernels.py --commit HASH

Each case and tool has a process of its own, which makes its inputs on the host and launches little but the kernel. XLA
sometimes does not come back from compiling what a case needs beside the kernel under the sanitizer; a process that does
not end in time is begun again, a few times.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pages import result_file

import pallas_kernels as pk
from convert.folder import write_json
from pallas_kernels.mosaic_matmul import matmul
from pallas_kernels.tiling import Tiling

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "sanitizer.json"
TOOLS = ("memcheck", "racecheck", "synccheck")
BF16, E4M3 = jnp.bfloat16, jnp.float8_e4m3fn
WORKERS, SECONDS, TRIES = 8, 45.0, 4

Case = tuple[Callable[..., Any], tuple[Any, ...]]


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), BF16)


def rows(name: str, m: int, k: int) -> Case:
    operation = getattr(pk, name)
    options = {"eps": 1e-5} if name == "norm_quantize" else {}
    others = {"norm_quantize": [jnp.ones(k, BF16)], "gate_quantize": [normal(1, m, k)]}.get(name, [])
    return lambda *a: operation(*a, **options, implementation="mosaic_gpu"), (normal(0, m, k), *others)


def product(
    implementation: str, m: int, sizes: tuple[int, ...], k: int, with_residual: bool = False, **options: Any
) -> Case:
    rng, group_size = np.random.default_rng(0), 128
    tiles = []
    for n in sizes:
        codes = pk.pack_int4(jnp.asarray(rng.integers(-8, 8, (n, k)), jnp.int8))
        tiles.append(pk.to_tiles(codes, jnp.asarray(rng.uniform(0.5, 2, (n, k // group_size)), E4M3)))
    x8, scale = pk.quantize_fp8(normal(0, m, k))
    residual = normal(1, m, sizes[0]) if with_residual else None

    def multiply(x8: jax.Array, scale: jax.Array, tiles: list[jax.Array], residual: jax.Array | None) -> Any:
        weights = [pk.TiledWeight(t, jnp.float32(0.5), None, n) for t, n in zip(tiles, sizes, strict=True)]
        return pk.int4_fp8_matmuls_tiled(
            x8, scale, weights, residual,
            group_size=group_size, scale_dtype=E4M3, implementation=implementation, **options,
        )  # fmt: skip

    return multiply, (x8, scale, tiles, residual)


def tiled(m: int, n: int, k: int, tiling: Tiling, with_residual: bool = False, **options: Any) -> Case:
    """A product cut as the rules might not cut one of so small sizes."""
    _, arrays = product("reference", m, (n,), k, with_residual)

    def multiply(x8: jax.Array, scale: jax.Array, tiles: list[jax.Array], residual: jax.Array | None) -> Any:
        weights = tiles, [jnp.float32(0.5)], [None]
        settings = {"sizes": (n,), "group_size": 128, "scale_dtype": E4M3, "tiling": tiling, **options}
        return matmul(x8, scale, *weights, residual, **settings)

    return multiply, arrays


SHARING = Tiling(128, 6, share=2)  # the last tiles are divided
BLOCKS = Tiling(128, 8, split=2, halves=1, unroll=2, persistent=False)
WIDE = Tiling(128, 6, halves=1, unroll=2, sides=3)
TEAMS = {"teams": 2, "sides": 1, "persistent": False, "halves": 1, "unroll": 2}


def unnormed(m: int, k: int, n: int) -> Case:
    """Tokens that the kernel normalises itself."""
    _, (_, _, tiles, _) = product("reference", 1, (n,), k)

    def multiply(x: jax.Array, gain: jax.Array, tiles: list[jax.Array]) -> Any:
        weight = pk.TiledWeight(tiles[0], jnp.float32(0.5), None, n)
        return pk.int4_matmuls_tiled(
            pk.Unnormed(x, gain, 1e-5), [weight],
            group_size=128, scale_dtype=E4M3, implementation="mosaic_gpu_matvec",
        )  # fmt: skip

    return multiply, (normal(0, m, k), jnp.ones(k, BF16), tiles)


def empty_cache(batch: int, kv_heads: int, slots: int, head_dim: int) -> tuple[jax.Array, ...]:
    codes, scales = (batch, kv_heads, slots, head_dim // 2), (batch, kv_heads, slots)
    return (jnp.zeros(codes, jnp.uint8), jnp.ones(scales, BF16)) * 2


def rotation(
    name: str, batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int, scaled: bool = False,
    mixed: bool = False,
) -> Case:  # fmt: skip
    angles = np.random.default_rng(9).uniform(0, 6, (batch, tokens, 1, head_dim // 2))
    cos, sin = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    projections = [normal(i, batch, tokens, h, head_dim) for i, h in enumerate((heads, kv_heads, kv_heads))]
    cache = empty_cache(batch, kv_heads, -(-(tokens + 8) // 8) * 8, head_dim)
    lengths = jnp.arange(batch, dtype=jnp.int32) % tokens + 1
    arrays = (*projections, cos, sin, cache, jnp.arange(batch, dtype=jnp.int32) % 8, lengths)
    operation = getattr(pk, name)
    scale, offset = (normal(i, kv_heads, head_dim).astype(jnp.float32) for i in (5, 6))
    tables = {"scale": jnp.exp(scale) if scaled else None, "key_offset": offset if mixed else None}
    return lambda *a: operation(*a[:-1], **a[-1], implementation="mosaic_gpu"), (*arrays, tables)


def prompt(batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int, prefix: int = 0) -> Case:
    q8, q_scale = pk.quantize_fp8(normal(0, batch, tokens, heads, head_dim), largest=pk.QUERY_MAX)
    k8, k_scale = pk.quantize_blocks(normal(1, batch, tokens, kv_heads, head_dim), largest=pk.KEY_MAX)
    v8, v_scale = pk.quantize_blocks(normal(2, batch, tokens, kv_heads, head_dim))
    arrays = [q8, q_scale, k8, k_scale, pk.transpose_values(v8), v_scale, jnp.full(batch, tokens - 3, jnp.int32)]
    if prefix:
        arrays += [empty_cache(batch, kv_heads, prefix, head_dim), jnp.full(batch, prefix - 1, jnp.int32)]
    return lambda *a: pk.prefill_attention(*a, softmax_scale=head_dim**-0.5, implementation="mosaic_gpu"), tuple(arrays)


def cached(batch: int, context: int, heads: int, kv_heads: int, head_dim: int) -> Case:
    q8, q_scale = pk.quantize_fp8(normal(0, batch, 1, heads, head_dim))
    position = jnp.full((batch, 1), context - 2, jnp.int32)
    arrays = (q8, q_scale, *empty_cache(batch, kv_heads, context, head_dim), position)
    return lambda *a: pk.decode_attention(*a, softmax_scale=head_dim**-0.5, implementation="mosaic_gpu"), arrays


CASES: dict[str, Callable[[], Case]] = {
    "rounding": lambda: rows("quantize_rows", 3, 4104),
    "norm": lambda: rows("norm_quantize", 3, 4104),
    "gate": lambda: rows("gate_quantize", 3, 1032),
    "gate in clusters": lambda: rows("gate_quantize", 2, 14336),
    "matvec": lambda: product("mosaic_gpu_matvec", 5, (192, 64), 640),
    "matvec, many steps": lambda: product("mosaic_gpu_matvec", 2, (4288,), 5120, with_residual=True),
    "matvec with its norm": lambda: unnormed(1, 1024, 192),
    "matvec with the norms of three": lambda: unnormed(3, 1024, 192),
    "matmul, inputs split": lambda: product("mosaic_gpu", 16, (256,), 2048, with_residual=True),
    "matmul, 64 tokens": lambda: product("mosaic_gpu", 50, (128, 64), 1024),
    "matmul, parts of tiles": lambda: tiled(40, 192, 2048, Tiling(16, 4, halves=1, unroll=2, stream_k=True)),
    "matmul, 192 outputs": lambda: tiled(300, 576, 640, WIDE, with_residual=True),
    "matmul, 192 outputs, tokens divided": lambda: tiled(130, 192, 2048, replace(WIDE, split=2, persistent=False)),
    "matmul, 192 outputs, shared": lambda: tiled(300, 576, 640, replace(WIDE, share=2)),
    "matmul, 256 outputs": lambda: tiled(300, 576, 640, Tiling(128, 4, halves=1, sides=4)),
    "matmul, shared tokens": lambda: tiled(600, 576, 512, SHARING),
    "matmul, shared tokens, residual": lambda: tiled(600, 512, 512, SHARING, with_residual=True),
    "matmul, divided tiles": lambda: tiled(600, 576, 2048, SHARING),
    "matmul, divided tiles, residual": lambda: tiled(130, 192, 2048, SHARING, with_residual=True),
    "matmul, divided tiles, float32": lambda: tiled(130, 192, 2048, SHARING, out_dtype=jnp.float32),
    "matmul, tokens divided by teams": lambda: tiled(130, 192, 2048, Tiling(96, 12, **TEAMS), with_residual=True),
    "matmul, tokens divided by all": lambda: tiled(130, 192, 2048, Tiling(128, 8, split=2, **TEAMS)),
    "matmul, divided, residual": lambda: tiled(130, 192, 2048, Tiling(128, 8, split=2, **TEAMS), with_residual=True),
    "matmul, tokens divided by blocks": lambda: tiled(130, 192, 2048, BLOCKS, with_residual=True),
    "matmul, folded": lambda: product("mosaic_gpu", 130, (192,), 512, numerics="folded"),
    "rotation of tokens": lambda: rotation("rotate_and_append", 3, 1, 8, 2, 128),
    "rotation of tokens, mixed": lambda: rotation("rotate_and_append", 3, 1, 8, 2, 64, scaled=True, mixed=True),
    "rotation of prompts": lambda: rotation("rotate_and_round", 2, 150, 4, 2, 128),
    "rotation of prompts, scaled": lambda: rotation("rotate_and_round", 2, 150, 4, 2, 128, scaled=True),
    "rotation of prompts, mixed": lambda: rotation("rotate_and_round", 2, 150, 4, 2, 64, scaled=True, mixed=True),
    "prefill attention": lambda: prompt(2, 300, 4, 2, 128),
    "prefill attention, heads of 64": lambda: prompt(2, 300, 3, 1, 64),
    "prefill attention behind a prefix": lambda: prompt(1, 150, 2, 2, 128, prefix=136),
    "decode attention, split": lambda: cached(1, 2048, 8, 2, 128),
    "decode attention, many splits": lambda: cached(1, 16384, 2, 1, 64),
    "decode attention, unsplit": lambda: cached(64, 304, 4, 2, 64),
}  # fmt: skip


def launch(name: str) -> None:
    """Launches a case's kernel once, with inputs that the host made."""
    with jax.default_device(jax.devices("cpu")[0]):
        operation, arrays = CASES[name]()
    arrays = jax.block_until_ready(jax.device_put(arrays, jax.devices()[0]))
    for leaf in jax.tree.leaves(jax.block_until_ready(jax.jit(operation)(*arrays))):
        assert not np.isnan(np.asarray(leaf).astype(np.float32)).any()


def examine(name: str, tool: str) -> dict[str, Any]:
    """Launches a case under one of the sanitizer's tools."""
    began = time.perf_counter()
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    # XLA's own kernels, which a joined prefix takes, are not ours to examine.
    which = ["--kernel-name", "kernel_substring=mosaic_gpu_kernel", "--show-backtrace", "device"]
    done = run_in_time([sanitizer, "--tool", tool, *which, sys.executable, __file__, "--case", name])
    lines = [] if done is None else done.stdout.splitlines()
    verdicts = [line.strip("= ") for line in lines if "SUMMARY" in line]
    status = None if done is None else done.returncode
    if status or not verdicts or not all(" 0 errors" in v or " 0 hazards" in v for v in verdicts):
        print(name, tool, *lines[:40], sep="\n", flush=True)
    return {"exit status": status, "verdicts": verdicts, "seconds": time.perf_counter() - began}


def run_in_time(command: list[str]) -> "subprocess.CompletedProcess[str] | None":
    """Runs a command, again where it does not end in time; None if it never does."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    for _ in range(TRIES):
        with suppress(subprocess.TimeoutExpired):
            return subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=SECONDS,
                env=environment,
            )  # fmt: skip
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=result_file, default=RESULTS)
    parser.add_argument("--commit", help="to record")
    parser.add_argument("--only", choices=CASES, nargs="+", help="examine these cases; what is known of others is kept")
    parser.add_argument("--case", choices=CASES, help="launch this case alone, as the sanitizer does")
    args = parser.parse_args()
    if args.case:
        launch(args.case)
        return
    known = json.loads(RESULTS.read_text("utf-8"))["cases"] if args.only else {}
    results: dict[str, Any] = {"command": "python examples/sanitize_kernels.py", "cases": known}
    about = {"commit": args.commit, "device": jax.devices()[0].device_kind, "versions": {"jax": version("jax")}}
    names = args.only or list(CASES)
    known.update({name: dict(about) for name in names})
    pairs = [(name, tool) for name in names for tool in TOOLS]
    with ThreadPoolExecutor(WORKERS) as pool:
        for (name, tool), found in zip(pairs, pool.map(lambda pair: examine(*pair), pairs), strict=True):
            known[name][tool] = found
            print(name, tool, found, flush=True)
            write_json(args.out, results)


if __name__ == "__main__":
    main()
