"""What :mod:`fireq_jax.benchmark` times: calls of jitted functions, with random weights and tokens."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from fireq_jax.config import LlamaConfig
from fireq_jax.generate import compiled_generate
from fireq_jax.kv_cache import KVCache
from fireq_jax.layers import DecoderBlock
from fireq_jax.llama import Llama
from fireq_jax.quantize import cache_kind, layer_names, parameter_bytes
from fireq_jax.sampling import Sampling

Params = Mapping[str, Any]

LONG_ENOUGH = 4.0  # seconds of repeated calls
# Blocks of up to 64 tokens in a loop; of more tokens as much work. A call takes 0.1 to 0.3 ms beside its kernels, which
# is then less than a hundredth of the loop.
LOOPED_BLOCKS = 2048
SAMPLING = Sampling(temperature=0.8, top_p=0.95)
# Products are then cuBLASLt's; XLA's own would be tried in so many forms that compiling did not end in minutes.
FP8_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


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


class Call(NamedTuple):
    """A jitted function and its arguments: the static ones around arrays, which are made when they are needed."""

    function: Any
    first: Any
    arrays: Callable[[], tuple[Any, ...]]
    last: tuple[Any, ...] = ()
    parts: int = 1  # equal calls that the function makes, of which one is to be timed

    def compile(self, options: dict[str, Any] | None = None) -> Any:
        """The compiled function, of arrays of these shapes; nothing is made."""
        return self.function.lower(self.first, *jax.eval_shape(self.arrays), *self.last).compile(options)

    def bound(self, compiled: Any) -> Callable[[], Any]:
        """A call of what :meth:`compile` made."""
        arrays = self.arrays()
        return lambda: compiled(*arrays)

    def measure(self, compiled: Any) -> Measured:
        """What a part of what :meth:`compile` made takes, and the memory of all."""
        memory = compiled.memory_analysis()
        needed = (
            memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )  # fmt: skip
        seconds = unless_too_large(lambda: shortest_seconds(self.bound(compiled)))
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
def prefill(model: Llama, params: Params, tokens: jax.Array, lengths: jax.Array, capacity: int) -> Any:
    """Logits behind prompts, and the cache with them in it."""
    cache = KVCache.zeros(model.config, tokens.shape[0], capacity, cache_kind(params), model.dtype)
    return model.apply({"params": params}, tokens, lengths, cache, method="prefill")


@functools.partial(jax.jit, static_argnums=0)
def decode(model: Llama, params: Params, tokens: jax.Array, cache: KVCache) -> Any:
    """Logits behind a token per sequence, and the grown cache."""
    return model.apply({"params": params}, tokens, cache, method="decode")


def random_tokens(config: LlamaConfig, batch: int, length: int) -> jax.Array:
    """``[batch, length]`` int32."""
    return jax.random.randint(jax.random.key(batch), (batch, length), 0, config.vocab_size, jnp.int32)


def shortest_seconds(call: Callable[[], Any]) -> float:
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


def unless_too_large(measure: Callable[..., float], *arguments: Any) -> float | None:
    """What ``measure`` gives, or None if the device's memory does not suffice."""
    try:
        return measure(*arguments)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def copy_bandwidth(size: int = 1 << 28) -> float:
    """Bytes per second, read and written, of elementwise passes from one array of ``size`` float32 to another."""
    if jax.default_backend() == "cpu":
        size >>= 4
    passes = 16
    call = jax.jit(jnp.negative)
    x = jnp.zeros(size, jnp.float32)
    return 2 * 4 * size * passes / shortest_seconds(lambda: [call(x) for _ in range(passes)])


@functools.partial(jax.jit, static_argnums=(0, 3))
def _feed_forward(config: LlamaConfig, layers: Sequence[Params], x: jax.Array, rounds: int) -> jax.Array:
    def one_round(_: Any, x: jax.Array) -> jax.Array:
        for layer in layers:
            x = cast(jax.Array, DecoderBlock(config).apply({"params": layer}, x, method="feed_forward"))
        return x

    return jax.lax.fori_loop(0, rounds, one_round, x)


def looped_rounds(config: LlamaConfig, tokens: int) -> int:
    """How often a loop goes through the blocks of all layers: once on a CPU, where these take long enough."""
    if jax.default_backend() == "cpu":
        return 1
    return max(1, LOOPED_BLOCKS * 64 // (max(tokens, 64) * config.num_layers))


def feed_forward_call(model: Llama, params: Params, tokens: int) -> Call:
    """A loop over the blocks of all layers, per block."""
    config = model.config
    layers = [params[name] for name in layer_names(params)]
    rounds = looped_rounds(config, tokens)

    def arrays() -> tuple[Any, ...]:
        return layers, jax.random.normal(jax.random.key(0), (1, tokens, config.hidden_size), jnp.bfloat16)

    return Call(_feed_forward, config, arrays, (rounds,), rounds * len(layers))


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


def feed_forward_fp8_call(config: LlamaConfig, tokens: int) -> Call:
    """As :func:`feed_forward_call`, of a block in fp8 by XLA alone."""
    wide, hidden = config.intermediate_size, config.hidden_size
    shapes = [(wide, hidden), (wide, hidden), (hidden, wide)]
    rounds = looped_rounds(config, tokens)

    def arrays() -> tuple[Any, ...]:
        layers = [
            tuple(_normal(jax.random.key(3 * i + j), shape).astype(jnp.float8_e4m3fn) for j, shape in enumerate(shapes))
            for i in range(config.num_layers)
        ]
        x = jax.random.normal(jax.random.key(0), (tokens, hidden), jnp.bfloat16)
        return layers, jnp.ones((), jnp.bfloat16), x

    return Call(_feed_forward_fp8, config, arrays, (rounds,), rounds * config.num_layers)


def _behind(model: Llama, params: Params, batch: int, context: int, room: int) -> tuple[Any, ...]:
    """Parameters, a token per sequence, and a cache with ``context`` tokens before it and ``room`` for more."""
    cache = KVCache.zeros(model.config, batch, context + room, cache_kind(params), model.dtype)
    return params, random_tokens(model.config, batch, 1), replace(cache, lengths=jnp.full(batch, context, jnp.int32))


def prefill_call(model: Llama, params: Params, batch: int, length: int) -> Call:
    """Full prompts, up to the logits behind them."""

    def arrays() -> tuple[Any, ...]:
        return params, random_tokens(model.config, batch, length), jnp.full(batch, length, jnp.int32)

    return Call(prefill, model, arrays, (length,))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _decode_greedily(model: Llama, params: Params, tokens: jax.Array, cache: KVCache, steps: int) -> jax.Array:
    """A loop on the device, the choice of the tokens included.

    Its result is the last token: the caches that it grows are temporary arrays beside those it is given.
    """

    def step(_: Any, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        logits, grown = cast(Any, model.apply({"params": params}, *carry, method="decode"))
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), grown

    return jax.lax.fori_loop(0, steps, step, (tokens, cache))[0]


def decode_call(model: Llama, params: Params, batch: int, context: int, new_tokens: int) -> Call:
    """A loop that begins behind ``context`` tokens, per token."""
    arrays = functools.partial(_behind, model, params, batch, context, new_tokens)
    return Call(_decode_greedily, model, arrays, (new_tokens,), new_tokens)


def generate_call(model: Llama, params: Params, batch: int, length: int, new_tokens: int) -> Call:
    """Prompts and what follows them, with no token that ends a sequence."""

    def arrays() -> tuple[Any, ...]:
        return params, random_tokens(model.config, batch, length), jnp.full(batch, length, jnp.int32), jax.random.key(0)

    return Call(compiled_generate, model, arrays, (new_tokens, SAMPLING, (), length + new_tokens))


def step_bytes(params: Params, of_token: int, batch: int, context: float) -> int:
    """Bytes that a decode step must read: every weight but the input embedding, and the caches."""
    weights = parameter_bytes(params)
    if "lm_head" in params:
        weights -= parameter_bytes(params["embed"])
    return round(weights + batch * context * of_token)
