"""What a float model's activations look like on a text: the statistics that calibrated quantisation reads."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fireq_jax.layers import DecoderBlock, rope_tables
from fireq_jax.llama import Llama
from fireq_jax.quantize import layer_names, recipe_of

# Rotated keys kept per layer, spread over the whole text, for choosing the scales of the key cache.
KEY_SAMPLES = 512
Statistics = dict[str, Any]


def calibrate(
    model: Llama,
    params: Mapping[str, Any],
    tokens: np.ndarray | list[int],
    *,
    window: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Runs a text through a float model, one layer at a time, and collects statistics of every linear input.

    Memory: on the device one layer's weights and statistics and one window; on the host the hidden states of the whole
    text (tokens · hidden · 4 bytes) and the result (per layer 3 · hidden² + intermediate² floats, if heads · head_dim =
    hidden).

    Args:
      model: the Llama.
      params: its float parameters.
      tokens: token ids; 8k are enough to halve the loss, more help a little. Those behind the last whole window are
        not used.
      window: tokens per sequence.
      progress: called with (layers done, layers in all).

    Returns:
      Per layer name (``"layers_0"`` ...), as float32 numpy arrays:

      - ``attention_input``, ``attention_output``, ``mlp_input``, ``mlp_hidden``: second moments ``E[x xᵀ]``,
        ``[k, k]``, of the inputs of q/k/v, of o, of gate/up and of down.
      - ``keys``: rotated keys of up to 512 tokens, ``[samples, kv heads, head_dim]``.
      - ``query_energy``: ``E[q²]`` of rotated queries, averaged over a kv head's query heads, ``[kv heads, head_dim]``.

    Raises:
      ValueError: the parameters are quantised, the text is shorter than a window or holds tokens outside the
        vocabulary, or the window exceeds the model's positions.
    """
    config = model.config
    ids = np.asarray(tokens)
    if recipe_of(params) is not None:
        raise ValueError("calibration needs the float parameters, these are quantised")
    if not 1 <= window <= config.max_positions:
        raise ValueError(f"{window=} must be between 1 and the model's {config.max_positions} positions")
    if ids.ndim != 1 or ids.size < window:
        raise ValueError(f"the text has {ids.size} tokens; calibration needs at least one window of {window}")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(f"token ids {ids.min()} to {ids.max()} leave the vocabulary of {config.vocab_size}")
    ids = ids[: ids.size - ids.size % window].reshape(-1, window).astype(np.int32)
    hidden = [np.asarray(_embed(params["embed"]["embedding"], row)) for row in ids]
    block = DecoderBlock(config, jnp.float32)
    samples = -(-KEY_SAMPLES // len(hidden))
    names = layer_names(params)
    statistics: Statistics = {}
    for done, name in enumerate(names, 1):
        total = None
        keys = []
        for i, x in enumerate(hidden):
            x, sums, sampled = _observe(block, params[name], x, min(samples, window))
            hidden[i] = np.asarray(x)
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
            keys.append(np.asarray(sampled))
        means = jax.tree.map(lambda x: np.asarray(x) / ids.size, total)
        statistics[name] = {**means, "keys": np.concatenate(keys)}
        if progress is not None:
            progress(done, len(names))
    return statistics


@jax.jit
def _embed(embedding: jax.Array, row: jax.Array) -> jax.Array:
    return embedding[row].astype(jnp.float32)[None]


@partial(jax.jit, static_argnums=(0, 3))
def _observe(
    block: DecoderBlock, layer: Mapping[str, Any], x: jax.Array, samples: int
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """The block's output for one window, sums of its statistics over the window, and a sample of its keys."""
    t = x.shape[1]
    config = block.config
    rope = rope_tables(config, jnp.arange(t)[None])
    starts, lengths = jnp.zeros(1, jnp.int32), jnp.full(1, t, jnp.int32)
    result: Any = block.apply({"params": layer}, x, rope, None, starts, lengths, "prefill", mutable=["statistics"])
    (out, _), state = result
    seen = state["statistics"]

    def second_moment(part: str, projection: str) -> jax.Array:
        rows = seen[part][projection]["input"][0].astype(jnp.float32).reshape(t, -1)
        return jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)

    queries = seen["attention"]["queries"][0][0].reshape(t, config.num_kv_heads, -1, config.head_dim)
    sums = {
        "attention_input": second_moment("attention", "q"),
        "attention_output": second_moment("attention", "o"),
        "mlp_input": second_moment("mlp", "gate"),
        "mlp_hidden": second_moment("mlp", "down"),
        "query_energy": jnp.sum(jnp.mean(jnp.square(queries), axis=2), axis=0),
    }
    picked = jnp.linspace(0, t - 1, samples).astype(jnp.int32)
    return out, sums, seen["attention"]["keys"][0][0][picked]
