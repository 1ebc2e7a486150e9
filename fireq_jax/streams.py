"""A calibration text on its way through a float model and through its quantised copy, one block after another."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fireq_jax.compiling import jit_untuned
from fireq_jax.config import LlamaConfig, Recipe
from fireq_jax.kv_cache import CacheKind, empty_layer_cache
from fireq_jax.layers import MLP, Attention, DecoderBlock, Linear, RMSNorm, rope_tables

Layer = dict[str, Any]
# Quantises the weights of the named projections of one half of a block ("attention" or "mlp"), which read the same
# input; gets the block, the half, the names, E[x̂ x̂ᵀ] and E[x x̂ᵀ], returns the block with those weights replaced.
RoundReaders = Callable[[Layer, str, tuple[str, ...], jax.Array, jax.Array], Layer]

# Per input, as statistics name it: the half of a block and the weights that read it.
READERS = {
    "attention_input": ("attention", ("q", "k", "v")),
    "attention_output": ("attention", ("o",)),
    "mlp_input": ("mlp", ("gate", "up")),
    "mlp_hidden": ("mlp", ("down",)),
}
# Windows whose moments are summed in one product: `best` takes a sixth less time on two cores than one by one.
TOGETHER = 8


class Streams:
    """Hidden states of a text in a float model and in the quantised model that is being made of it.

    Memory: both hidden states of the whole text, and the four inputs of one block's weights (tokens · (3 · hidden +
    intermediate) · 4 bytes), on the device.

    Args:
      config: the model.
      embedding: ``[vocab, hidden]``.
      tokens: ``[windows, window]`` int32.
      recipe: its kind of cache counts: keys and values pass through it.
    """

    def __init__(self, config: LlamaConfig, embedding: jax.Array, tokens: np.ndarray, recipe: Recipe) -> None:
        self._config = config
        self._cache_kind = recipe.kv_cache
        self._float = [embedding[row].astype(jnp.float32)[None] for row in tokens]
        self._quantized = list(self._float)
        self._tokens = tokens.size

    def round_block(
        self, layer: Layer, round_readers: RoundReaders, importance: Mapping[str, jax.Array] | None = None
    ) -> Layer:
        """Quantises one block's weights in the order in which the text meets them, and takes the text through it.

        Args:
          layer: float parameters of the next block, transformed.
          round_readers: quantises the weights that read one input.
          importance: of each of :data:`READERS`, how much a token counts in its moments, ``[windows, window]``, 1 in
            the mean; None if all count alike.

        Returns:
          The quantised block.
        """
        config = self._config
        passes = [_float_block(config, layer, x) for x in self._float]
        self._float = [out for out, _ in passes]
        seen = [inputs for _, inputs in passes]

        def rounded(layer: Layer, place: str, rows: list[jax.Array]) -> Layer:
            half, names = READERS[place]
            k = seen[0][place].shape[1]
            sums = jnp.zeros((k, k)), jnp.zeros((k, k))
            for first in range(0, len(rows), TOGETHER):
                together = slice(first, first + TOGETHER)
                counts = None if importance is None else importance[place][together]
                sums = _add_moments(sums, [inputs[place] for inputs in seen[together]], rows[together], counts)
            hessian, cross = (total / self._tokens for total in sums)
            return round_readers(layer, half, names, hessian, cross)

        x = self._quantized
        normed = [_norm(config, layer["input_norm"], row) for row in x]
        layer = rounded(layer, "attention_input", normed)
        attended = [_attend(config, layer["attention"], row, self._cache_kind) for row in normed]
        layer = rounded(layer, "attention_output", attended)
        middle = [_add_attention(config, layer["attention"], *rows) for rows in zip(x, attended, strict=True)]
        normed = [_norm(config, layer["post_attention_norm"], row) for row in middle]
        layer = rounded(layer, "mlp_input", normed)
        gated = [_gate(config, layer["mlp"], row) for row in normed]
        layer = rounded(layer, "mlp_hidden", gated)
        self._quantized = [_add_mlp(config, layer["mlp"], *rows) for rows in zip(middle, gated, strict=True)]
        return layer

    def state(self) -> dict[str, np.ndarray]:
        """Both hidden states behind the blocks so far, ``[windows, window, hidden]``, for :meth:`restore`."""
        streams = {"float": self._float, "quantized": self._quantized}
        return {name: np.concatenate([np.asarray(x) for x in rows]) for name, rows in streams.items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on behind the blocks after which :meth:`state` was called."""
        self._float = [jnp.asarray(row)[None] for row in state["float"]]
        self._quantized = [jnp.asarray(row)[None] for row in state["quantized"]]


def block_inputs(state: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The inputs of a block's weights, from the ``statistics`` collection of an applied block of one sequence.

    Returns:
      ``[t, k]`` float32 for each of :data:`READERS`.
    """
    return {place: _rows(state[half][names[0]]["input"][0]) for place, (half, names) in READERS.items()}


def _rows(x: jax.Array) -> jax.Array:
    """``[1, t, ...] -> [t, k]`` float32."""
    return x.astype(jnp.float32).reshape(x.shape[1], -1)


def _attention_arguments(config: LlamaConfig, t: int, kind: CacheKind | None) -> tuple[Any, ...]:
    """What attention takes besides its input, for one sequence of t tokens from position 0 on."""
    rope = rope_tables(config, jnp.arange(t)[None])
    starts, lengths = jnp.zeros(1, jnp.int32), jnp.full(1, t, jnp.int32)
    if kind is None:
        return rope, None, starts, lengths, "prefill"
    return rope, empty_layer_cache(config, 1, t, kind, jnp.float32), starts, lengths, "cached"


def observe_block(config: LlamaConfig, layer: Layer, x: jax.Array) -> tuple[jax.Array, Mapping[str, Any]]:
    """A float block's output for one sequence, ``[1, t, hidden]``, and what its parts sowed as ``statistics``."""
    arguments = _attention_arguments(config, x.shape[1], None)
    block = DecoderBlock(config, jnp.float32)
    result: Any = block.apply({"params": layer}, x, *arguments, mutable=["statistics"])
    (out, _), state = result
    return out, state["statistics"]


@partial(jit_untuned, static_argnums=0)
def _float_block(config: LlamaConfig, layer: Layer, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    out, state = observe_block(config, layer, x)
    return out, block_inputs(state)


@partial(jit_untuned, donate_argnums=0)
def _add_moments(
    sums: tuple[jax.Array, jax.Array], x: list[jax.Array], quantized_x: list[jax.Array], counts: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Adds those of some windows to the sums of x̂ x̂ᵀ and x x̂ᵀ.

    ``x`` is ``[t, k]`` of each window and ``quantized_x`` any shape of as many elements. A token counts as often as
    ``counts`` says, ``[windows, t]``, or once.
    """
    quantized, exact = jnp.concatenate([_rows(row) for row in quantized_x]), jnp.concatenate(x)
    counted = quantized if counts is None else quantized * counts.reshape(-1, 1)
    hessian, cross = sums
    highest = jax.lax.Precision.HIGHEST
    return (
        hessian + jnp.matmul(counted.T, quantized, precision=highest),
        cross + jnp.matmul(exact.T, counted, precision=highest),
    )


@partial(jax.jit, static_argnums=0)
def _norm(config: LlamaConfig, params: Layer, x: jax.Array) -> jax.Array:
    out: Any = RMSNorm(config.rms_norm_eps, jnp.float32).apply({"params": params}, x)
    return out


@partial(jit_untuned, static_argnums=(0, 3))
def _attend(config: LlamaConfig, params: Layer, x: jax.Array, kind: CacheKind) -> jax.Array:
    """The input of o, ``[1, t, heads, head_dim]``."""
    arguments = _attention_arguments(config, x.shape[1], kind)
    result: Any = Attention(config, jnp.float32).apply({"params": params}, x, *arguments, mutable=["statistics"])
    return result[1]["statistics"]["o"]["input"][0]


@partial(jit_untuned, static_argnums=0)
def _add_attention(config: LlamaConfig, params: Layer, x: jax.Array, attended: jax.Array) -> jax.Array:
    heads = (config.num_heads, config.head_dim)
    out: Any = Linear(heads, (config.hidden_size,), config.attention_bias, jnp.float32).apply(
        {"params": params["o"]}, attended
    )
    return x + out


@partial(jit_untuned, static_argnums=0)
def _gate(config: LlamaConfig, params: Layer, x: jax.Array) -> jax.Array:
    """The input of down, ``[1, t, intermediate]``."""
    result: Any = MLP(config, jnp.float32).apply({"params": params}, x, mutable=["statistics"])
    return result[1]["statistics"]["down"]["input"][0]


@partial(jit_untuned, static_argnums=0)
def _add_mlp(config: LlamaConfig, params: Layer, x: jax.Array, gated: jax.Array) -> jax.Array:
    shapes = (config.intermediate_size,), (config.hidden_size,)
    out: Any = Linear(*shapes, config.mlp_bias, jnp.float32).apply({"params": params["down"]}, gated)
    return x + out
