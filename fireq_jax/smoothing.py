"""Choosing the scales of :mod:`fireq_jax.scaling` for one decoder block.

Functions here take a block's float parameters and its statistics (:mod:`fireq_jax.calibrate`) and return both as they
are after the chosen transform.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fireq_jax import scaling
from fireq_jax.numerics import group_absmax, to_grid
from pallas_kernels import INT4_MAX, quantize_kv, unpack_int4

Layer = dict[str, Any]
LayerStatistics = dict[str, jax.Array]
HIGHEST = jax.lax.Precision.HIGHEST

# Exponents tried for the inputs' root mean square and for the weights' mean magnitude.
INPUT_EXPONENTS = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75)
WEIGHT_EXPONENTS = (0.0, 0.3, 0.6, 1.0)
# Exponents tried for the keys' largest magnitudes, and factors of the channel-by-channel refinement behind that.
KEY_EXPONENTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
KEY_FACTORS = (0.6, 0.8, 0.9, 1.1, 1.25, 1.6)
KEY_SWEEPS = 2

# Statistic of the input, block, weights that read it, transform.
_PLACES: dict[str, tuple[str, tuple[str, ...], Callable[[Layer, jax.Array], Layer]]] = {
    "attention_input": ("attention", ("q", "k", "v"), scaling.scale_attention_input),
    "attention_output": ("attention", ("o",), scaling.scale_values),
    "mlp_input": ("mlp", ("gate", "up"), scaling.scale_mlp_input),
    "mlp_hidden": ("mlp", ("down",), scaling.scale_mlp_hidden),
}


def _readers(layer: Layer, place: str) -> jax.Array:
    """The weights that read one input, stacked: ``[n, k]`` float32."""
    block, names, _ = _PLACES[place]
    kernels = [layer[block][name]["kernel"].astype(jnp.float32) for name in names]
    k = math.prod(kernels[0].shape[-2:] if place == "attention_output" else kernels[0].shape[-1:])
    return jnp.concatenate([kernel.reshape(-1, k) for kernel in kernels])


def _reduce(layer: Layer, place: str, per_input: jax.Array) -> jax.Array:
    """``[k]`` -> the shape the place's transform takes, averaging what must be equal.

    The query heads of a kv head read the same values: ``[heads · d]`` becomes ``[kv heads, d]`` there.
    """
    if place != "attention_output":
        return per_input
    kv_heads, d, _ = layer["attention"]["v"]["kernel"].shape
    return jnp.mean(per_input.reshape(kv_heads, -1, d), axis=1)


def _expand(layer: Layer, place: str, s: jax.Array) -> jax.Array:
    """What a scale of :func:`_reduce`'s shape does to each input: ``[k]``."""
    return scaling.per_query_head(layer, s).reshape(-1) if place == "attention_output" else s


@jax.jit
def smooth_by_weights(layer: Layer) -> Layer:
    """FireQ's channel-wise scaling: every input channel's weights get the same mean magnitude. Needs no data."""
    for place, (_, _, transform) in _PLACES.items():
        magnitude = jnp.maximum(jnp.mean(jnp.abs(_readers(layer, place)), axis=0), 1e-8)
        layer = transform(layer, 1 / _reduce(layer, place, magnitude))
    return layer


@partial(jax.jit, static_argnums=2)
def smooth_by_search(
    layer: Layer, statistics: LayerStatistics, group_sizes: tuple[int, int, int, int]
) -> tuple[Layer, LayerStatistics]:
    """Channel-wise scaling by products of powers of the inputs' and the weights' magnitudes.

    For each place the exponents are kept with which rounding to nearest changes the outputs least, measured by
    ``tr(e H eᵀ)``.

    Args:
      layer: float parameters of a block.
      statistics: its statistics.
      group_sizes: weight groups at the inputs of attention, of o, of the MLP and of down.

    Returns:
      The scaled block and its statistics after the scaling.
    """
    for (place, (_, _, transform)), group_size in zip(_PLACES.items(), group_sizes, strict=True):
        hessian = statistics[place]
        s = _search_input_scale(layer, place, hessian, group_size)
        per_input = _expand(layer, place, s)
        layer = transform(layer, s)
        statistics = {**statistics, place: hessian / (per_input[:, None] * per_input)}
    return layer, statistics


def _search_input_scale(layer: Layer, place: str, hessian: jax.Array, group_size: int) -> jax.Array:
    """The best candidate, of :func:`_reduce`'s shape."""
    w = _readers(layer, place)
    energy = _reduce(layer, place, jnp.diagonal(hessian))
    inputs = jnp.sqrt(jnp.maximum(energy, 1e-6 * jnp.mean(energy) + 1e-20))
    weights = _reduce(layer, place, jnp.maximum(jnp.mean(jnp.abs(w), axis=0), 1e-8))

    def scale(exponents: jax.Array) -> jax.Array:
        s = inputs ** exponents[0] / weights ** exponents[1]
        return s / jnp.exp(jnp.mean(jnp.log(s)))

    def error(exponents: jax.Array) -> jax.Array:
        s = _expand(layer, place, scale(exponents))
        step = jnp.repeat(group_absmax(w * s, group_size) / INT4_MAX, group_size, axis=1) + 1e-20
        e = to_grid(w * s, step) * step / s - w
        return jnp.sum(jnp.matmul(e, hessian, precision=HIGHEST) * e)

    candidates = jnp.asarray([(a, b) for a in INPUT_EXPONENTS for b in WEIGHT_EXPONENTS])
    return scale(candidates[jnp.argmin(jax.lax.map(error, candidates))])


def scale_keys_as_fireq(layer: Layer, keys: jax.Array, top_k: int) -> Layer:
    """FireQ's two key scales: every rotated pair before RoPE, the largest channels and their partners after it.

    Before RoPE a pair is divided by the largest norm it takes (which the rotation does not change), so that all pairs
    reach 1. After it, the ``top_k`` channels of the largest magnitude and their partners are divided by theirs.

    Args:
      layer: float parameters of a block.
      keys: ``[samples, kv heads, d]`` rotated keys.
      top_k: channels per head; 0 leaves out the second scale.
    """
    low, high = jnp.split(keys, 2, axis=-1)
    norm = jnp.maximum(jnp.max(jnp.sqrt(low**2 + high**2), axis=0), 1e-6)
    layer = scaling.scale_keys_before_rope(layer, norm)
    if top_k == 0:
        return layer
    largest = jnp.max(jnp.abs(keys) / jnp.concatenate([norm, norm], axis=-1), axis=0)
    half = largest.shape[-1] // 2
    chosen = jnp.argsort(-largest, axis=-1)[:, :top_k]
    chosen = jnp.concatenate([chosen, (chosen + half) % (2 * half)], axis=-1)
    picked = jnp.zeros(largest.shape, bool).at[jnp.arange(largest.shape[0])[:, None], chosen].set(True)
    # Chosen channels come down to the typical magnitude of the others.
    typical = jnp.median(largest, axis=-1, keepdims=True)
    return scaling.scale_keys_after_rope(layer, jnp.where(picked, jnp.maximum(largest / typical, 1e-6), 1.0))


def scale_keys_by_search(layer: Layer, keys: jax.Array, query_energy: jax.Array) -> Layer:
    """Scales rotated keys, channel by channel, such that int4 rounding changes scores least.

    The mean squared error of a score is ``Σ_j E[q_j²] (k_j - k̂_j)²`` if a query's channels are uncorrelated. A power of
    the channels' largest magnitudes is where the search starts; then one channel after another tries some factors.

    Args:
      layer: float parameters of a block.
      keys: ``[samples, kv heads, d]`` rotated keys.
      query_energy: ``[kv heads, d]``.
    """
    return scaling.scale_keys_after_rope(layer, _search_key_scales(keys, query_energy))


@jax.jit
def _search_key_scales(keys: jax.Array, query_energy: jax.Array) -> jax.Array:
    """``[samples, kv heads, d]`` and ``[kv heads, d]`` -> scales ``[kv heads, d]``."""
    largest = jnp.maximum(jnp.max(jnp.abs(keys), axis=0), 1e-6)

    def errors(s: jax.Array) -> jax.Array:
        codes, step = quantize_kv(keys / s)
        e = unpack_int4(codes).astype(jnp.float32) * step.astype(jnp.float32)[..., None] * s - keys
        return jnp.sum(jnp.mean(e**2, axis=0) * query_energy, axis=-1)

    starts = jnp.stack([(largest / jnp.mean(largest, axis=-1, keepdims=True)) ** e for e in KEY_EXPONENTS])
    found = jax.lax.map(errors, starts)
    s = jnp.take_along_axis(starts, jnp.argmin(found, axis=0)[None, :, None], axis=0)[0]
    d = keys.shape[-1]

    def refine(i: jax.Array, s: jax.Array) -> jax.Array:
        channel = jnp.arange(d) == i % d
        trials = jnp.stack([jnp.where(channel, s * f, s) for f in (1.0, *KEY_FACTORS)])
        return jnp.take_along_axis(trials, jnp.argmin(jax.lax.map(errors, trials), axis=0)[None, :, None], axis=0)[0]

    return jax.lax.fori_loop(0, KEY_SWEEPS * d, refine, s)
