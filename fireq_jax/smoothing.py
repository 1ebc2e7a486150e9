"""Choosing the scales of :mod:`fireq_jax.scaling` for one decoder block.

Functions here take a block's float parameters and its statistics (:mod:`fireq_jax.calibrate`) and return both as they
are after the chosen transform.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fireq_jax import scaling
from fireq_jax.compiling import jit_untuned
from fireq_jax.config import LlamaConfig
from fireq_jax.numerics import group_absmax, to_grid
from fireq_jax.streams import READERS
from pallas_kernels import INT4_MAX, hadamard, quantize_kv, unpack_int4

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
# Keys that each trial of the search is judged by.
SEARCHED_KEYS = 512
# Positions over which a pair of key channels must stay within a quarter turn to be treated as if it did not rotate.
# Fewer would fit short texts better and long ones worse.
SLOW_POSITIONS = 4096

# What scales each of READERS' inputs.
_TRANSFORMS: dict[str, Callable[[Layer, jax.Array], Layer]] = {
    "attention_input": scaling.scale_attention_input,
    "attention_output": scaling.scale_values,
    "mlp_input": scaling.scale_mlp_input,
    "mlp_hidden": scaling.scale_mlp_hidden,
}


def _readers(layer: Layer, place: str) -> jax.Array:
    """The weights that read one input, stacked: ``[n, k]`` float32."""
    block, names = READERS[place]
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


def _rescaled_moments(layer: Layer, place: str, s: jax.Array, moments: jax.Array) -> jax.Array:
    """Second moments of a place's input behind its transform by s."""
    per_input = _expand(layer, place, s)
    return moments / (per_input[:, None] * per_input)


@partial(jax.jit, static_argnums=2)
def smooth_by_weights(
    layer: Layer, statistics: LayerStatistics | None, form: Literal["mean", "absmax"]
) -> tuple[Layer, LayerStatistics | None]:
    """FireQ's channel-wise scaling: every input channel's weights get the same magnitude. Needs no data.

    Args:
      layer: float parameters of a block.
      statistics: its statistics, if there are any; only followed.
      form: which magnitude becomes 1, the mean or the largest one.

    Returns:
      The scaled block and its statistics after the scaling.
    """
    measure = jnp.mean if form == "mean" else jnp.max
    for place, transform in _TRANSFORMS.items():
        magnitude = jnp.maximum(measure(jnp.abs(_readers(layer, place)), axis=0), 1e-8)
        s = 1 / _reduce(layer, place, magnitude)
        if statistics is not None:
            statistics = {**statistics, place: _rescaled_moments(layer, place, s, statistics[place])}
        layer = transform(layer, s)
    return layer, statistics


@partial(jit_untuned, static_argnums=2)
def smooth_by_search(
    layer: Layer, statistics: LayerStatistics, group_sizes: tuple[int, ...]
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
    for (place, transform), group_size in zip(_TRANSFORMS.items(), group_sizes, strict=True):
        s = _search_input_scale(layer, place, statistics[place], group_size)
        statistics = {**statistics, place: _rescaled_moments(layer, place, s, statistics[place])}
        layer = transform(layer, s)
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


def scale_keys_as_fireq(layer: Layer, largest: jax.Array, pair_norm: jax.Array, top_k: int) -> Layer:
    """FireQ's two key scales: the largest channels one by one after RoPE, all other rotated pairs before it.

    The ``top_k`` rotated channels of the largest magnitude, and their partners, are divided by that magnitude. The
    other pairs are divided by the largest norm they take, which the rotation does not change. Then every channel's
    largest magnitude is (in the other pairs: is at most) 1, the paper's alpha and beta.

    Args:
      layer: float parameters of a block.
      largest: ``[kv heads, d]``, the largest magnitude of each rotated channel.
      pair_norm: ``[kv heads, d / 2]``, the largest norm of each pair.
      top_k: channels per head; 0 leaves out the second scale.
    """
    largest, pair_norm = jnp.maximum(largest, 1e-6), jnp.maximum(pair_norm, 1e-6)
    kv_heads, half = pair_norm.shape
    pairs = jnp.argsort(-largest, axis=-1)[:, :top_k] % half
    picked = jnp.zeros(pair_norm.shape, bool).at[jnp.arange(kv_heads)[:, None], pairs].set(True)
    layer = scaling.scale_keys_before_rope(layer, jnp.where(picked, 1.0, pair_norm))
    if top_k == 0:
        return layer
    return scaling.scale_keys_after_rope(layer, jnp.where(jnp.tile(picked, 2), largest, 1.0))


def scale_keys_by_search(layer: Layer, keys: jax.Array, query_energy: jax.Array) -> Layer:
    """Scales rotated keys, channel by channel, such that int4 rounding changes scores least.

    The mean squared error of a score is ``Σ_j E[q_j²] (k_j - k̂_j)²`` if a query's channels are uncorrelated. A power of
    the channels' largest magnitudes is where the search starts; then one channel after another tries some factors.

    Args:
      layer: float parameters of a block.
      keys: ``[samples, kv heads, d]`` rotated keys.
      query_energy: ``[kv heads, d]``.
    """
    return scaling.scale_keys_after_rope(
        layer, _search_key_scales(keys[:: -(-len(keys) // SEARCHED_KEYS)], query_energy)
    )


def mix_keys(layer: Layer, keys: jax.Array, query_energy: jax.Array, slow: np.ndarray) -> Layer:
    """Prepares rotated keys for int4 by an offset, scales and a Hadamard matrix, all on line.

    Behind a Hadamard matrix the rounding error is spread evenly over channels, so the mean squared error of a score is
    proportional to ``Σ_j s_j² E[q_j²] · Σ_j E[(k_j - c_j)²] / s_j²`` for scales s and offset c, which is least for
    ``s_j² = sqrt(E[(k_j - c_j)²] / E[q_j²])`` and the mean key as c. What a pair of channels looks like at the short
    text's positions says little of later ones, unless it rotates slowly: other pairs share their energy and have no
    offset, which is right for any angle.

    Args:
      layer: float parameters of a block.
      keys: ``[samples, kv heads, d]`` rotated keys.
      query_energy: ``[kv heads, d]``.
      slow: ``[d / 2]`` bool, pairs that :func:`slow_pairs` finds.
    """
    both = jnp.tile(jnp.asarray(slow), 2)
    offset = jnp.where(both, jnp.mean(keys, axis=0), 0.0)
    return _mix_keys(layer, jnp.mean((keys - offset) ** 2, axis=0), query_energy, offset, both)


def mix_keys_by_weights(layer: Layer) -> Layer:
    """:func:`mix_keys` for inputs of which only the norm's gain is known: no offset, and all pairs share energy."""
    gain = layer["input_norm"]["scale"].astype(jnp.float32)

    def energy(name: str) -> jax.Array:
        part = layer["attention"][name]
        outputs = jnp.sum((part["kernel"].astype(jnp.float32) * gain) ** 2, axis=-1)
        return outputs + part["bias"].astype(jnp.float32) ** 2 if "bias" in part else outputs

    keys = energy("k")
    queries = jnp.mean(energy("q").reshape(keys.shape[0], -1, keys.shape[1]), axis=1)
    return _mix_keys(layer, keys, queries, jnp.zeros_like(keys), jnp.zeros(keys.shape[1], bool))


def _mix_keys(
    layer: Layer, key_energy: jax.Array, query_energy: jax.Array, offset: jax.Array, alone: jax.Array
) -> Layer:
    """The transform for known energies, ``[kv heads, d]``; channels that are not ``alone``, ``[d]``, share theirs."""

    def settled(energy: jax.Array) -> jax.Array:
        low, high = jnp.split(energy, 2, axis=-1)
        energy = jnp.where(alone, energy, jnp.tile((low + high) / 2, 2))
        return jnp.maximum(energy, 1e-6 * jnp.mean(energy, axis=-1, keepdims=True) + 1e-20)

    s = (settled(key_energy) / settled(query_energy)) ** 0.25
    s = s / jnp.exp(jnp.mean(jnp.log(s), axis=-1, keepdims=True))
    return scaling.rotate_keys_after_rope(scaling.scale_keys_after_rope(layer, s), offset / s)


def mix_values(layer: Layer, statistics: LayerStatistics | None) -> tuple[Layer, LayerStatistics | None]:
    """:func:`fireq_jax.scaling.rotate_values`, and the statistics behind it."""
    if statistics is not None:
        heads, d, _ = layer["attention"]["q"]["kernel"].shape
        rotation = jnp.asarray(hadamard(d))
        moments = statistics["attention_output"].reshape(heads, d, heads, d)
        moments = scaling.rotated("hdge,dx,ey->hxgy", moments, rotation, rotation)
        statistics = {**statistics, "attention_output": moments.reshape(heads * d, heads * d)}
    return scaling.rotate_values(layer), statistics


def slow_pairs(config: LlamaConfig) -> np.ndarray:
    """``[head_dim / 2]`` bool, channel pairs that turn by less than a quarter within ``SLOW_POSITIONS`` positions."""
    frequencies = config.rope.inverse_frequencies(config.head_dim)
    return frequencies * min(SLOW_POSITIONS, config.max_positions) <= math.pi / 2


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
