"""Speed of a Llama of given sizes, quantised and in bf16, through the same code in one run.

Weights are random and made on the device, since speed does not depend on what they say. Times are wall-clock times of
whole calls, or of a loop on the device over many blocks, so they hold what a user waits for: launches, gaps, sampling.
"""

import functools
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp

from fireq_jax import torch_benchmark
from fireq_jax.config import LlamaConfig, RopeConfig, resolve_recipe
from fireq_jax.generate import compiled_generate
from fireq_jax.kv_cache import KVCache, cache_bytes_per_token
from fireq_jax.layers import DecoderBlock
from fireq_jax.llama import Llama
from fireq_jax.quantize import cache_kind, parameter_bytes, quantize
from fireq_jax.sampling import Sampling

Params = Mapping[str, Any]

_LLAMA3 = RopeConfig(theta=5e5)
SIZES = {
    "llama-2-7b": LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128, 131072),
    "llama-2-13b": LlamaConfig(32000, 5120, 13824, 40, 40, 40, 128, 131072),
    "llama-3-8b": LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 131072, rope=_LLAMA3),
    "llama-3.2-1b": LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64, 131072, rope=_LLAMA3, tie_word_embeddings=True),
    "llama-3.2-3b": LlamaConfig(128256, 3072, 8192, 28, 24, 8, 128, 131072, rope=_LLAMA3, tie_word_embeddings=True),
    "toy": LlamaConfig(256, 128, 256, 2, 2, 1, 64, 1024),
}
# A random model's logits move by a tenth when its embedding moves by a unit of bf16, since activations then fall to
# other sides of their roundings. So kernels are not held to the reference implementation's logits but to its distance
# from the bf16 model's, times this.
CHECKED_TO = 1.25
LONG_ENOUGH = 4.0  # seconds of repeated calls
LAYERS_OF_A_LOOP = 8  # together larger than the L2 cache
SAMPLING = Sampling(temperature=0.8, top_p=0.95)
# Products are then cuBLASLt's; XLA's own would be tried in so many forms that compiling did not end in minutes.
FP8_OPTIONS = {"xla_gpu_enable_triton_gemm": False}

# What kernels' names tell of the operation they belong to; the first that fits counts.
OPERATORS = {
    "attention": ("prefill_attention", "decode_attention", "merge_splits", "sdpa", "fmha", "flash"),
    "matmul": ("int4_mat", "nvjet", "gemm", "cutlass", "cublas", "dot"),
    "norms and roundings": ("norm_quantize", "gate_quantize", "quantize_rows"),
    "rotation and cache": ("rotate_and_append", "rotate_and_round"),
}


def run_benchmark(
    name: str,
    *,
    recipe: str = "rtn",
    lm_head: Literal["float", "int8", "fp8", "int4"] = "float",
    feed_forward: Sequence[int] = (),
    prefill: Sequence[tuple[int, int]] = (),
    decode: Sequence[tuple[int, int]] = (),
    generate: Sequence[tuple[int, int]] = (),
    new_tokens: int = 64,
    operators: Literal["first", "all", "none"] = "first",
    fp8: bool = False,
    with_torch: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    save: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measures a model and the same model in bf16.

    Args:
      name: a key of ``SIZES``.
      recipe: a preset that needs no calibration.
      lm_head: the recipe's output projection, see :class:`fireq_jax.config.Recipe`.
      feed_forward: numbers of tokens at which a feed-forward block (norm, MLP, residual sum) is measured.
      prefill: pairs of batch size and prompt length.
      decode: pairs of batch size and context length.
      generate: pairs of batch size and prompt length, of which :func:`fireq_jax.generate` makes ``new_tokens`` more,
        drawn with ``SAMPLING``: prompt, loop and draws in one call.
      new_tokens: tokens generated per sequence at each of these.
      operators: which cases of ``prefill`` and of ``decode`` are profiled kernel by kernel (on a GPU).
      fp8: whether the block is measured in fp8 by XLA alone, too, at multiples of 16 tokens.
      with_torch: whether transformers' Llama in torch is measured, too, at ``prefill`` and ``decode``.
      progress: called with what comes next.
      save: called with what there is of the result, whenever a case is done.

    Returns:
      Sizes, device, versions, and a list of cases per kind, each with ``int4`` and ``bf16`` measurements: None where
      the device's memory does not suffice.

    Raises:
      ValueError: there are no such sizes, or a case does not fit the model's positions.
      ModuleNotFoundError: torch or transformers is missing.
      RuntimeError: the kernels' logits are further from the bf16 model's than those of the reference implementation;
        nothing was timed.
    """
    if name not in SIZES:
        raise ValueError(f"unknown sizes {name!r}; known: {', '.join(SIZES)}")
    config = SIZES[name]
    for batch, length in (*prefill, *((b, context + new_tokens) for b, context in (*decode, *generate))):
        if batch < 1 or not 1 <= length <= config.max_positions:
            raise ValueError(f"{batch} x {length} tokens: there are {config.max_positions} positions")
    of_torch = None
    if with_torch:  # before this process takes the device's memory
        progress("transformers in torch")
        of_torch = torch_benchmark.run(_transformers_config(config), prefill, decode, new_tokens)
    model = Llama(config)
    progress("making weights")
    params: dict[str, Params] = {"bf16": random_params(config)}
    settings = replace(resolve_recipe(recipe), lm_head=lm_head)
    params["int4"] = jax.block_until_ready(quantize(params["bf16"], settings))
    progress("checking against the reference implementation")
    distances = distances_from_float(model, params["int4"], params["bf16"])
    if not distances["kernels"] <= CHECKED_TO * distances["reference"]:
        raise RuntimeError(
            f"the kernels' logits are {distances['kernels']:.3f} from the bf16 model's, those of the reference "
            f"implementation {distances['reference']:.3f}; at most {CHECKED_TO} times that is expected"
        )
    result: dict[str, Any] = {
        "sizes": name,
        "config": asdict(config),
        "recipe": recipe,
        "lm_head": lm_head,
        "device": jax.devices()[0].device_kind,
        "versions": {package: version(package) for package in ("jax", "jaxlib", "flax")},
        "distances_from_bf16": distances,
        "copy_bytes_per_second": copy_bandwidth(),
        "parameter_bytes": {kind: parameter_bytes(p) for kind, p in params.items()},
        "cache_bytes_per_token": {
            kind: cache_bytes_per_token(config, cache_kind(p)) for kind, p in params.items()
        },
        "torch": of_torch,
        "feed_forward": [],
        "prefill": [],
        "decode": [],
        "generate": [],
        "operators": {},
    }  # fmt: skip

    def profiled(cases: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        return {"first": cases[:1], "all": cases, "none": ()}[operators]

    def measured(what: str, call_of: Callable[..., _Call], *case: int) -> dict[str, Measured]:
        """Per kind of model; of the first prompts the kernels, too."""
        found = {}
        for kind, p in params.items():
            progress(f"{kind}: {what} {' x '.join(map(str, case))}")
            call = call_of(model, p, *case)
            began = time.perf_counter()
            compiled = call.compile()
            compile_seconds = time.perf_counter() - began
            found[kind] = call.measure(compiled)._replace(compile_seconds=compile_seconds)
            if what == "prefill" and case in map(tuple, profiled(prefill)):
                result["operators"].setdefault(f"prefill {case[0]} x {case[1]}", {})[kind] = kernel_times(
                    call.bound(compiled)
                )
        return found

    for tokens in feed_forward:
        seconds = {kind: m.seconds for kind, m in measured("feed-forward", _feed_forward_call, tokens).items()}
        if fp8 and tokens % 16 == 0:  # cuBLASLt takes no other number in fp8
            progress(f"fp8: feed-forward {tokens}")
            call = _feed_forward_fp8_call(config, tokens)
            seconds["fp8"] = call.measure(call.compile(FP8_OPTIONS)).seconds
        result["feed_forward"].append({"tokens": tokens} | _by_kind("microseconds", seconds, 1e6))
        save(result)
    for batch, length in prefill:
        case: dict[str, Any] = {"batch": batch, "length": length}
        result["prefill"].append(case | _as_case(measured("prefill", _prefill_call, batch, length)))
        save(result)
    for batch, context in decode:
        needed = {
            kind: step_bytes(p, result["cache_bytes_per_token"][kind], batch, context + new_tokens / 2)
            for kind, p in params.items()
        }
        case = {"batch": batch, "context": context, "new_tokens": new_tokens, "bytes": needed}
        found = measured("decode", functools.partial(_decode_call, new_tokens=new_tokens), batch, context)
        result["decode"].append(case | _as_case(found))
        save(result)
    for batch, length in generate:
        case = {"batch": batch, "length": length, "new_tokens": new_tokens}
        found = measured("generate", functools.partial(_generate_call, new_tokens=new_tokens), batch, length)
        result["generate"].append(case | _as_case(found))
        save(result)
    for batch, context in profiled(decode):
        progress(f"kernels of decode {batch} x {context}")
        steps = {
            kind: _Call(_decode, model, functools.partial(_behind, model, p, batch, context, 2))
            for kind, p in params.items()
        }
        result["operators"][f"decode {batch} x {context}"] = {
            kind: kernel_times(call.bound(call.compile())) for kind, call in steps.items()
        }
        save(result)
    return result


class Measured(NamedTuple):
    """What a call took.

    Attributes:
      seconds: None if the device's memory does not suffice.
      memory_bytes: that its arguments, results and temporary arrays take together on the device.
      compile_seconds: that tracing and compiling it took, where that was timed.
    """

    seconds: float | None
    memory_bytes: int
    compile_seconds: float = 0.0


class _Call(NamedTuple):
    """A jitted function and its arguments: the static ones around arrays, which are made when they are needed."""

    function: Any
    first: Any
    arrays: Callable[[], tuple[Any, ...]]
    last: tuple[Any, ...] = ()
    parts: int = 1  # equal calls that the function makes, of which one is to be timed

    def compile(self, options: dict[str, Any] | None = None) -> Any:
        return self.function.lower(self.first, *jax.eval_shape(self.arrays), *self.last).compile(options)

    def bound(self, compiled: Any) -> Callable[[], Any]:
        """A call of what :meth:`compile` made."""
        arrays = self.arrays()
        return lambda: compiled(*arrays)

    def measure(self, compiled: Any) -> Measured:
        memory = compiled.memory_analysis()
        needed = (
            memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )  # fmt: skip
        seconds = _unless_too_large(lambda: _seconds(self.bound(compiled)))
        return Measured(None if seconds is None else seconds / self.parts, needed)


def random_params(config: LlamaConfig) -> Params:
    """A float parameter pytree of normal numbers in bf16, norms of ones."""
    shapes = jax.eval_shape(lambda: Llama(config).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))["params"]
    count = 0

    def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        nonlocal count
        count += 1
        if path[-1].key == "scale":
            return jnp.ones(shape.shape, jnp.bfloat16)
        return _normal(jax.random.key(count), shape.shape)

    result: Params = jax.tree_util.tree_map_with_path(leaf, shapes)
    return result


@functools.partial(jax.jit, static_argnums=1)
def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape, jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _prefill(model: Llama, params: Params, tokens: jax.Array, lengths: jax.Array, capacity: int) -> Any:
    cache = KVCache.zeros(model.config, tokens.shape[0], capacity, cache_kind(params), model.dtype)
    return model.apply({"params": params}, tokens, lengths, cache, method="prefill")


@functools.partial(jax.jit, static_argnums=0)
def _decode(model: Llama, params: Params, tokens: jax.Array, cache: KVCache) -> Any:
    return model.apply({"params": params}, tokens, cache, method="decode")


def _transformers_config(config: LlamaConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def _tokens(config: LlamaConfig, batch: int, length: int) -> jax.Array:
    return jax.random.randint(jax.random.key(batch), (batch, length), 0, config.vocab_size, jnp.int32)


def distances_from_float(model: Llama, params: Params, float_params: Params) -> dict[str, float]:
    """How far logits are from the float model's, relative Frobenius: by kernels, and by the reference implementation.

    Of the first two layers, behind two prompts and, through the cache, behind a token more of both and of the first
    alone, since a single token takes other kernels.
    """
    few = min(2, model.config.num_layers)
    small = model.clone(config=replace(model.config, num_layers=few))
    tokens, lengths = _tokens(model.config, 2, 131), jnp.asarray([130, 77], jnp.int32)

    def logits(params: Params, implementation: str | None) -> jax.Array:
        kept = {name: leaf for name, leaf in params.items() if not name.startswith("layers_")}
        kept |= {f"layers_{i}": params[f"layers_{i}"] for i in range(few)}
        network = small.clone(implementation=implementation)
        first, cache = _prefill(network, kept, tokens[:, :-1], lengths, 132)
        second, _ = _decode(network, kept, tokens[:, -1:], cache)
        alone, _ = _decode(network, kept, tokens[:1, -1:], jax.tree.map(lambda array: array[:1], cache))
        return jnp.concatenate([first, second[:, 0], alone[:, 0]])

    expected = logits(float_params, None)
    found = {"kernels": logits(params, None), "reference": logits(params, "reference")}
    return {name: float(jnp.linalg.norm(x - expected) / jnp.linalg.norm(expected)) for name, x in found.items()}


def _seconds(call: Callable[[], Any]) -> float:
    """The shortest of several calls, behind one that warms up: what else the machine does only ever adds.

    Three at least, and short ones up to twenty times in half a second, unless they take more than ``LONG_ENOUGH``.
    """
    jax.block_until_ready(call())
    found: list[float] = []
    while sum(found) < LONG_ENOUGH and (len(found) < 3 or (sum(found) < 0.5 and len(found) < 20)):
        began = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - began)
    return min(found)


def _as_case(measured: Mapping[str, Measured]) -> dict[str, Any]:
    seconds = {kind: found.seconds for kind, found in measured.items()}
    return _by_kind("milliseconds", seconds, 1e3) | {
        "memory_bytes": {kind: found.memory_bytes for kind, found in measured.items()},
        "compile_seconds": {kind: found.compile_seconds for kind, found in measured.items()},
    }


def _unless_too_large(measure: Callable[..., float], *arguments: Any) -> float | None:
    """What ``measure`` gives, or None if the device's memory does not suffice."""
    try:
        return measure(*arguments)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def _by_kind(unit: str, seconds: Mapping[str, float | None], factor: float) -> dict[str, Any]:
    return {unit: {kind: None if s is None else s * factor for kind, s in seconds.items()}}


def copy_bandwidth(size: int = 1 << 28) -> float:
    """Bytes per second, read and written, of elementwise passes from one array of ``size`` float32 to another."""
    if jax.default_backend() == "cpu":
        size >>= 4
    passes = 16
    call = jax.jit(jnp.negative)
    x = jnp.zeros(size, jnp.float32)
    return 2 * 4 * size * passes / _seconds(lambda: [call(x) for _ in range(passes)])


@functools.partial(jax.jit, static_argnums=(0, 3))
def _feed_forward(config: LlamaConfig, layers: Sequence[Params], x: jax.Array, rounds: int) -> jax.Array:
    def one_round(_: Any, x: jax.Array) -> jax.Array:
        for layer in layers:
            x = cast(jax.Array, DecoderBlock(config).apply({"params": layer}, x, method="feed_forward"))
        return x

    return jax.lax.fori_loop(0, rounds, one_round, x)


def _feed_forward_call(model: Llama, params: Params, tokens: int) -> _Call:
    """A loop over the blocks of several layers, per block."""
    config = model.config
    layers = [params[f"layers_{i}"] for i in range(min(LAYERS_OF_A_LOOP, config.num_layers))]
    rounds = max(1, 64 // math.isqrt(tokens))

    def arrays() -> tuple[Any, ...]:
        return layers, jax.random.normal(jax.random.key(0), (1, tokens, config.hidden_size), jnp.bfloat16)

    return _Call(_feed_forward, config, arrays, (rounds,), rounds * len(layers))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _feed_forward_fp8(
    config: LlamaConfig, layers: Sequence[tuple[jax.Array, ...]], scale: jax.Array, x: jax.Array, rounds: int
) -> jax.Array:
    """As :func:`_feed_forward` with e4m3 weights and activations and a scale per tensor, products left to XLA."""

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        # XLA makes an fp8 product of cuBLASLt of this.
        a, b = (array.astype(jnp.bfloat16) * scale for array in (x.astype(jnp.float8_e4m3fn), w))
        return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)

    def one_round(_: Any, x: jax.Array) -> jax.Array:
        for gate, up, down in layers:
            wide = x.astype(jnp.float32)
            normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + config.rms_norm_eps)
            x = x + product(jax.nn.silu(product(normed, gate)) * product(normed, up), down)
        return x

    return jax.lax.fori_loop(0, rounds, one_round, x)


def _feed_forward_fp8_call(config: LlamaConfig, tokens: int) -> _Call:
    """As :func:`_feed_forward_call`, of a block in fp8 by XLA alone."""
    wide, hidden = config.intermediate_size, config.hidden_size
    shapes = [(wide, hidden), (wide, hidden), (hidden, wide)]
    count, rounds = min(LAYERS_OF_A_LOOP, config.num_layers), max(1, 64 // math.isqrt(tokens))

    def arrays() -> tuple[Any, ...]:
        layers = [
            tuple(_normal(jax.random.key(3 * i + j), shape).astype(jnp.float8_e4m3fn) for j, shape in enumerate(shapes))
            for i in range(count)
        ]
        x = jax.random.normal(jax.random.key(0), (tokens, hidden), jnp.bfloat16)
        return layers, jnp.ones((), jnp.bfloat16), x

    return _Call(_feed_forward_fp8, config, arrays, (rounds,), rounds * count)


def _behind(model: Llama, params: Params, batch: int, context: int, room: int) -> tuple[Any, ...]:
    """Parameters, a token per sequence, and a cache with ``context`` tokens before it and ``room`` for more."""
    cache = KVCache.zeros(model.config, batch, context + room, cache_kind(params), model.dtype)
    return params, _tokens(model.config, batch, 1), replace(cache, lengths=jnp.full(batch, context, jnp.int32))


def _prefill_call(model: Llama, params: Params, batch: int, length: int) -> _Call:
    """Full prompts, up to the logits behind them."""

    def arrays() -> tuple[Any, ...]:
        return params, _tokens(model.config, batch, length), jnp.full(batch, length, jnp.int32)

    return _Call(_prefill, model, arrays, (length,))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _decode_greedily(model: Llama, params: Params, tokens: jax.Array, cache: KVCache, steps: int) -> jax.Array:
    """A loop on the device, the choice of the tokens included.

    Its result is the last token: the caches that it grows are temporary arrays beside those it is given.
    """

    def step(_: Any, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        logits, grown = cast(Any, model.apply({"params": params}, *carry, method="decode"))
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), grown

    return jax.lax.fori_loop(0, steps, step, (tokens, cache))[0]


def _decode_call(model: Llama, params: Params, batch: int, context: int, new_tokens: int) -> _Call:
    """A loop that begins behind ``context`` tokens, per token."""
    arrays = functools.partial(_behind, model, params, batch, context, new_tokens)
    return _Call(_decode_greedily, model, arrays, (new_tokens,), new_tokens)


def _generate_call(model: Llama, params: Params, batch: int, length: int, new_tokens: int) -> _Call:
    """Prompts and what follows them, with no token that ends a sequence."""

    def arrays() -> tuple[Any, ...]:
        return params, _tokens(model.config, batch, length), jnp.full(batch, length, jnp.int32), jax.random.key(0)

    return _Call(compiled_generate, model, arrays, (new_tokens, SAMPLING, (), length + new_tokens))


def step_bytes(params: Params, of_token: int, batch: int, context: float) -> int:
    """Bytes that a decode step must read: every weight but the input embedding, and the caches."""
    weights = parameter_bytes(params)
    if "lm_head" in params:
        weights -= parameter_bytes(params["embed"])
    return round(weights + batch * context * of_token)


def kernel_times(call: Callable[[], Any]) -> dict[str, Any]:
    """Microseconds of the kernels of a call by operation, and of each kernel's name; empty where no GPU runs them."""
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        [trace] = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        events = [
            event
            for plane in planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    names: dict[str, dict[str, float]] = {}
    for event in events:
        entry = names.setdefault(event.name, {"count": 0, "microseconds": 0.0})
        entry["count"] += 1
        entry["microseconds"] += event.duration_ns / 1e3
    by_operator = dict.fromkeys((*OPERATORS, "other"), 0.0)
    for name, entry in names.items():
        by_operator[operator_of(name)] += entry["microseconds"]
    return {"microseconds": by_operator, "kernels": names} if names else {}


def operator_of(kernel: str) -> str:
    """The operation that a kernel of this name belongs to."""
    for operator, parts in OPERATORS.items():
        if any(part in kernel for part in parts):
            return operator
    return "other"
