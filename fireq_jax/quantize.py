"""From a float parameter pytree to an INT4/FP8 one: pure functions, ``params -> params``.

The way of a weight is transform, round, wrap. Transforms that leave the float model's logits as they are go before
the rounding and see the whole pytree of float weights; the rounding sees one weight at a time.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fireq_jax import smoothing
from fireq_jax.config import LlamaConfig, Recipe, resolve_recipe
from fireq_jax.curvature import Curvature, loss_curvature
from fireq_jax.kv_cache import CacheKind
from fireq_jax.numerics import round_to_bytes, round_weight
from fireq_jax.qtensor import ByteWeight, Int4Weight, Layout, is_int4, to_layout
from fireq_jax.refine import refine_gains, refinement_steps
from fireq_jax.rounding import corrected_weight, round_weight_searched, round_weights_calibrated
from fireq_jax.streams import READERS, Streams

Params = dict[str, Any]
Statistics = dict[str, jax.Array] | None  # of a block; None without a calibration

# How many trailing axes of each weight are inputs: the output projection of attention reads [heads, head_dim].
INPUT_AXES = {
    ("attention", "q"): 1,
    ("attention", "k"): 1,
    ("attention", "v"): 1,
    ("attention", "o"): 2,
    ("mlp", "gate"): 1,
    ("mlp", "up"): 1,
    ("mlp", "down"): 1,
}


def recipe_of(params: Mapping[str, Any]) -> Recipe | None:
    """The recipe a pytree was quantised with, or None if it is a float one."""
    return params.get("recipe")


def cache_kind(params: Mapping[str, Any]) -> CacheKind:
    """How a model with these parameters caches keys and values."""
    recipe = recipe_of(params)
    return "float" if recipe is None else recipe.kv_cache


def layer_names(params: Mapping[str, Any]) -> list[str]:
    """Keys of the decoder blocks, in order."""
    count = sum(name.startswith("layers_") for name in params)
    return [f"layers_{i}" for i in range(count)]


def parameter_bytes(params: Mapping[str, Any]) -> int:
    """Bytes that the arrays of a pytree take on a device."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))


def quantize(
    params: Mapping[str, Any],
    recipe: Recipe | str | None = None,
    *,
    calibration: Mapping[str, Any] | None = None,
    layout: Layout = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Params:
    """Rounds the linear weights of a Llama to INT4, one decoder block at a time.

    Embedding, norms and (unless the recipe says otherwise) the output projection keep their dtype; norms take up
    scales. The result is what the model, :func:`fireq_jax.generate` and :func:`fireq_jax.evaluate` take in place of
    float parameters. Without a calibration scales are chosen from the weights alone; a calibration adds scales chosen
    by output error and error-compensated rounding, which take away most of the loss (``docs/accuracy.md``). The preset
    "learned" takes away a fifth of what "best" leaves, by gradients through the whole model.

    Args:
      params: float parameters as ``convert.load`` returns them or ``model.init`` makes them; not modified. The
        sizes of everything are read from the pytree.
      recipe: a :class:`Recipe` or the name of a preset (``fireq_jax.PRESETS``); None takes "best" with a calibration
        and "data_free" without.
      calibration: statistics of these parameters by :func:`fireq_jax.calibrate`.
      layout: of the int4 weights, see :func:`fireq_jax.to_layout`.
      progress: called with (steps done, steps in all), a step being a block, or some windows of a recipe that
        differentiates.

    Returns:
      A pytree of the same structure, with an :class:`Int4Weight` for every quantised weight, scales that the rotation
      applies on line where the recipe asks for them, and the recipe under ``"recipe"`` (part of the structure, no
      array).

    Raises:
      ValueError: ``layout`` is unknown, ``params`` is quantised already or is no Llama pytree, the preset is unknown,
        the recipe needs a calibration and there is none, the calibration is of another model, a weight holds NaN or
        infinity, or the group size does not divide a weight's input size. Under ``jax.jit`` values are not known and
        only shapes are checked.
    """
    recipe = resolve_recipe(recipe if recipe is not None else "data_free" if calibration is None else "best")
    to_layout({}, layout)  # refuses an unknown one
    _check_float_llama(params)
    layers = layer_names(params)
    if recipe.needs_calibration and calibration is None:
        raise ValueError(
            f"recipe {recipe.name!r} needs calibration=fireq_jax.calibrate(model, params, tokens); "
            "'data_free' needs none"
        )
    if calibration is not None:
        _check_calibration(params, calibration)
    for name in layers:
        for half, projection in INPUT_AXES:
            pick_group_size(_inputs(params[name], half, projection), recipe, f"{name}/{half}/{projection}")
    result = dict(params)
    config: Any = None if calibration is None else calibration["config"]
    tokens: Any = None if calibration is None else calibration["tokens"]
    blocks = BlockQuantizer(recipe, config, params["embed"]["embedding"], tokens)
    steps = len(layers)
    if recipe.curvature:
        steps += len(tokens)
    if recipe.refine:
        steps += refinement_steps(tokens)

    def report(before: int, done: int) -> None:
        if progress is not None:
            progress(before + done, steps)

    def transformed(name: str) -> tuple[Params, Statistics]:
        return blocks.transform(name, params[name], None if calibration is None else calibration[name])

    done, floats, curvatures = 0, {}, {}
    if recipe.curvature:
        # Without statistics, which would be those of all blocks at once: rounding in sequence makes its own.
        floats = {name: transformed(name)[0] for name in layers}
        curvatures = loss_curvature(config, params, floats, tokens, partial(report, 0))
        done = len(tokens)
    for number, name in enumerate(layers, 1):
        layer, statistics = (floats.pop(name), None) if recipe.curvature else transformed(name)
        result[name] = blocks.round(name, layer, statistics, curvatures.pop(name, None))
        report(done, number)
    done += len(layers)
    if recipe.lm_head != "float":
        head = params["lm_head"]["kernel"] if "lm_head" in params else params["embed"]["embedding"]
        result["lm_head"] = {"kernel": quantize_head(head, recipe)}
    if recipe.refine:
        result = refine_gains(config, params, result, tokens, recipe, partial(report, done))
    for name in [*layers, "lm_head"]:  # a part at a time, so that only one is there twice
        if name in result:
            result[name] = to_layout(result[name], layout)
    return result | {"recipe": recipe}


class BlockQuantizer:
    """Quantises the decoder blocks of one model, which are handed in one after another.

    Only one block's weights are held at a time. A sequential recipe holds the calibration text's hidden states, too.

    Args:
      recipe: how to quantise.
      config: the model's sizes; only a calibrated recipe needs them.
      embedding: ``[vocab, hidden]``; only a sequential recipe reads it.
      tokens: ``[windows, window]``, the calibration text; None without a calibration.
    """

    def __init__(
        self, recipe: Recipe, config: LlamaConfig | None, embedding: jax.Array | None, tokens: np.ndarray | None
    ) -> None:
        self._recipe = recipe
        self._slow = None if config is None else smoothing.slow_pairs(config)
        self._streams = None
        if recipe.sequential and config is not None and embedding is not None and tokens is not None:
            self._streams = Streams(config, embedding, tokens, recipe)

    def transform(self, name: str, layer: Params, statistics: Mapping[str, Any] | None) -> tuple[Params, Statistics]:
        """A float block as it is to be rounded, and its statistics, which fit that.

        Args:
          name: of the block, for errors.
          layer: its float parameters.
          statistics: what :func:`fireq_jax.calibrate` found for it; None without a calibration.

        Raises:
          ValueError: a weight holds NaN or infinity, or no group size divides its inputs.
        """
        for half, projection in INPUT_AXES:  # before transforms spread a NaN
            _check_finite(layer[half][projection]["kernel"], f"{name}/{half}/{projection}")
        arrays = None if statistics is None else jax.tree.map(jnp.asarray, dict(statistics))
        return _transform(layer, arrays, self._slow, self._recipe, name)

    def round(self, name: str, layer: Params, statistics: Statistics, curvature: Curvature | None = None) -> Params:
        """The next block, quantised.

        Args:
          name: of the block, for errors.
          layer: of :meth:`transform`.
          statistics: of that; a sequential recipe does without them.
          curvature: of the loss, for a recipe that asks for it.
        """
        round_readers = partial(
            _round_readers, curvatures=None if curvature is None else curvature.outputs, recipe=self._recipe, name=name
        )
        if self._streams is not None:
            return self._streams.round_block(layer, round_readers, None if curvature is None else curvature.importance)
        for place, (half, projections) in READERS.items():
            layer = round_readers(layer, half, projections, None if statistics is None else statistics[place], None)
        return layer

    def state(self) -> dict[str, np.ndarray]:
        """What the next block needs from those before it, for :meth:`restore`."""
        return {} if self._streams is None else self._streams.state()

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on behind the blocks after which :meth:`state` was called."""
        if self._streams is not None:
            self._streams.restore(state)


def quantize_head(head: jax.Array, recipe: Recipe) -> Int4Weight | ByteWeight:
    """The output projection, ``[vocab, hidden]``, as the recipe says: in int8, e4m3 or int4."""
    if recipe.lm_head in ("int8", "fp8"):
        codes, scales = _round_to_bytes(head, recipe.lm_head)
        return ByteWeight(codes, scales, head.shape[:1], head.shape[1:])
    group_size = pick_group_size(head.shape[1], recipe, "lm_head")
    return _wrap(_round_nearest(head, group_size, recipe), head.shape, 1, recipe)


def _transform(
    layer: Params, statistics: Statistics, slow: np.ndarray | None, recipe: Recipe, name: str
) -> tuple[Params, Statistics]:
    """Rescales one float block as the recipe says; returns its statistics as they are after that, too."""
    if recipe.smoothing in ("mean", "absmax"):
        layer, statistics = smoothing.smooth_by_weights(layer, statistics, recipe.smoothing)
    elif recipe.smoothing == "search" and statistics is not None:
        sizes = {
            place: pick_group_size(_inputs(layer, half, names[0]), recipe, name)
            for place, (half, names) in READERS.items()
        }
        layer, statistics = smoothing.smooth_by_search(layer, statistics, tuple(sizes.values()))
    # Behind the smoothing: these scale whole rows of q and k, whose magnitudes "mean" and "absmax" read.
    if recipe.keys == "fireq" and statistics is not None:
        layer = smoothing.scale_keys_as_fireq(
            layer, statistics["key_absmax"], statistics["key_pair_norm"], recipe.key_top_k
        )
    elif recipe.keys == "search" and statistics is not None:
        layer = smoothing.scale_keys_by_search(layer, statistics["keys"], statistics["query_energy"])
    elif recipe.keys == "hadamard" and statistics is not None and slow is not None:
        layer = smoothing.mix_keys(layer, statistics["keys"], statistics["query_energy"], slow)
    elif recipe.keys == "hadamard":
        layer = smoothing.mix_keys_by_weights(layer)
    if recipe.values == "hadamard":
        layer, statistics = smoothing.mix_values(layer, statistics)
    return layer, statistics


def _round_readers(
    layer: Params,
    half: str,
    projections: tuple[str, ...],
    hessian: jax.Array | None,
    cross: jax.Array | None,
    *,
    curvatures: Mapping[str, jax.Array] | None,
    recipe: Recipe,
    name: str,
) -> Params:
    """The block with the named weights of one half, which read the same input, as int4.

    Args:
      layer: a block.
      half: "attention" or "mlp".
      projections: names of the weights.
      hessian: ``[k, k]``, second moments of their input; None if unknown.
      cross: ``[k, k]``, those of the float model's input with theirs; None if that is the same input.
      curvatures: of each projection's outputs, see :class:`fireq_jax.curvature.Curvature`; None if they count alike.
      recipe: how to round.
      name: of the block.
    """
    if recipe.weights == "none":
        return layer
    kernels = [layer[half][projection]["kernel"] for projection in projections]
    axes = INPUT_AXES[half, projections[0]]
    k = _inputs(layer, half, projections[0])
    group_size = pick_group_size(k, recipe, f"{name}/{half}/{projections[0]}")
    matrices = tuple(kernel.reshape(-1, k) for kernel in kernels)
    # What else the recipe says must not make the functions compile again.
    rules = Recipe(
        scales=recipe.scales, tensor_scale=recipe.tensor_scale, numerics=recipe.numerics, rounding=recipe.rounding
    )
    if recipe.rounding == "nearest":
        parts = [_round_nearest(matrix, group_size, rules) for matrix in matrices]
    elif hessian is None:
        parts = [round_weight_searched(matrix, group_size, rules) for matrix in matrices]
    else:
        if cross is not None:
            matrices = tuple(corrected_weight(matrix.astype(jnp.float32), hessian, cross) for matrix in matrices)
        of_outputs = None if curvatures is None else tuple(curvatures[projection] for projection in projections)
        parts = round_weights_calibrated(matrices, hessian, group_size, rules, of_outputs)
    weights = {
        projection: {**layer[half][projection], "kernel": _wrap(part, kernel.shape, axes, recipe)}
        for projection, kernel, part in zip(projections, kernels, parts, strict=True)
    }
    return {**layer, half: {**layer[half], **weights}}


def _check_float_llama(params: Mapping[str, Any]) -> None:
    known = recipe_of(params)
    if known is not None or any(is_int4(x) for x in jax.tree.leaves(params, is_leaf=is_int4)):
        raise ValueError(
            f"params are quantised already (recipe {known.name if known else 'unknown'!r}); "
            "quantize the float parameters they came from"
        )
    layers = layer_names(params)
    if not layers or "embed" not in params:
        raise ValueError(f"params are not those of a Llama: no 'embed' and 'layers_0' among {sorted(params)[:8]}")
    for name in layers:
        for block, projection in INPUT_AXES:
            if "kernel" not in params[name].get(block, {}).get(projection, {}):
                raise ValueError(f"params[{name!r}] lacks {block}/{projection}/kernel")


def _check_calibration(params: Mapping[str, Any], calibration: Mapping[str, Any]) -> None:
    if not isinstance(calibration.get("config"), LlamaConfig) or "tokens" not in calibration:
        raise ValueError("the calibration lacks 'config' or 'tokens'; it must be what fireq_jax.calibrate returned")
    for name in layer_names(params):
        for place, (half, projections) in READERS.items():
            k = _inputs(params[name], half, projections[0])
            found = calibration.get(name, {}).get(place)
            if found is None or found.shape != (k, k):
                shape = None if found is None else found.shape
                raise ValueError(f"the calibration is not of this model: {name}/{place} must be {(k, k)}, is {shape}")


def _check_finite(w: jax.Array, name: str) -> None:
    finite = all_finite(w)
    if not isinstance(finite, jax.core.Tracer) and not bool(finite):
        raise ValueError(f"{name} holds NaN or infinity; the checkpoint is damaged")


def _inputs(layer: Params, half: str, projection: str) -> int:
    """How many inputs a weight has."""
    return math.prod(layer[half][projection]["kernel"].shape[-INPUT_AXES[half, projection] :])


@jax.jit
def all_finite(w: jax.Array) -> jax.Array:
    """Whether an array holds neither NaN nor infinity, without a second array of its size."""
    return jnp.all(jnp.isfinite(w))


def pick_group_size(k: int, recipe: Recipe, name: str) -> int:
    """The first of the recipe's group sizes that divides ``k`` inputs.

    Raises:
      ValueError: none does; the message says for which weight.
    """
    sizes = (recipe.group_size,) if isinstance(recipe.group_size, int) else recipe.group_size
    for size in sizes:
        if k % size == 0:
            return size
    divisors = ", ".join(str(g) for g in (128, 64, 32, 16) if k % g == 0) or "none of 128, 64, 32, 16"
    raise ValueError(f"{name}: {k=} is not divisible by group_size={recipe.group_size}; it is by {divisors}")


def _wrap(
    parts: tuple[jax.Array, jax.Array, jax.Array], shape: tuple[int, ...], input_axes: int, recipe: Recipe
) -> Int4Weight:
    return Int4Weight(*parts, shape[:-input_axes], shape[-input_axes:], recipe.numerics, recipe.activations)


_round_nearest = jax.jit(round_weight, static_argnums=(1, 2))
_round_to_bytes = jax.jit(round_to_bytes, static_argnums=1)
