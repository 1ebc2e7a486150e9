"""From a float parameter pytree to an INT4/FP8 one: pure functions, ``params -> params``.

The way of a weight is transform, round, wrap. Transforms that leave the float model's logits as they are go before
the rounding and see the whole pytree of float weights; the rounding sees one weight at a time.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fireq_jax import smoothing
from fireq_jax.config import Recipe, resolve_recipe
from fireq_jax.numerics import round_weight
from fireq_jax.qtensor import Int4Weight, is_int4
from fireq_jax.rounding import round_weight_calibrated

Params = dict[str, Any]

# How many trailing axes of each weight are inputs: the output projection of attention reads [heads, head_dim].
_INPUT_AXES = {
    ("attention", "q"): 1,
    ("attention", "k"): 1,
    ("attention", "v"): 1,
    ("attention", "o"): 2,
    ("mlp", "gate"): 1,
    ("mlp", "up"): 1,
    ("mlp", "down"): 1,
}
# The statistic that describes the input of each.
_INPUT_STATISTIC = {
    ("attention", "q"): "attention_input",
    ("attention", "k"): "attention_input",
    ("attention", "v"): "attention_input",
    ("attention", "o"): "attention_output",
    ("mlp", "gate"): "mlp_input",
    ("mlp", "up"): "mlp_input",
    ("mlp", "down"): "mlp_hidden",
}


def recipe_of(params: Mapping[str, Any]) -> Recipe | None:
    """The recipe a pytree was quantised with, or None if it is a float one."""
    return params.get("recipe")


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
    progress: Callable[[int, int], None] | None = None,
) -> Params:
    """Rounds the linear weights of a Llama to INT4, one decoder block at a time.

    Embedding, norms and (unless the recipe says otherwise) the output projection keep their dtype; norms take up
    scales. The result is what the model, :func:`fireq_jax.generate` and :func:`fireq_jax.evaluate` take in place of
    float parameters. Without a calibration weights are rounded to nearest; a calibration adds scales chosen by output
    error and error-compensated rounding, which is the larger part of the accuracy (``docs/accuracy.md``).

    Args:
      params: float parameters as ``convert.load`` returns them or ``model.init`` makes them; not modified. The
        sizes of everything are read from the pytree.
      recipe: a :class:`Recipe` or the name of a preset (``fireq_jax.PRESETS``); None takes "best" with a calibration
        and "rtn" without.
      calibration: statistics of these parameters by :func:`fireq_jax.calibrate`.
      progress: called with (blocks done, blocks in all).

    Returns:
      A pytree of the same structure, with an :class:`Int4Weight` for every quantised weight, scales that the rotation
      applies on line where the recipe asks for them, and the recipe under ``"recipe"`` (part of the structure, no
      array).

    Raises:
      ValueError: ``params`` is quantised already or is no Llama pytree, the preset is unknown, the recipe needs a
        calibration and there is none, the calibration is of another model, a weight holds NaN or infinity, or the
        group size does not divide a weight's input size. Under ``jax.jit`` values are not known and only shapes are
        checked.
    """
    recipe = resolve_recipe(recipe if recipe is not None else "rtn" if calibration is None else "best")
    _check_float_llama(params)
    layers = layer_names(params)
    if recipe.needs_calibration:
        if calibration is None:
            raise ValueError(
                f"recipe {recipe.name!r} needs calibration=fireq_jax.calibrate(model, params, tokens); 'rtn' needs none"
            )
        _check_calibration(params, calibration)
    for name in layers:
        for part, axes in _INPUT_AXES.items():
            _pick_group_size(params[name][part[0]][part[1]]["kernel"], axes, recipe, f"{name}/{'/'.join(part)}")
    result = dict(params)
    for done, name in enumerate(layers, 1):
        statistics = None if calibration is None else jax.tree.map(jnp.asarray, calibration[name])
        result[name] = _quantize_layer(params[name], statistics, recipe, name)
        if progress is not None:
            progress(done, len(layers))
    if recipe.lm_head:
        head = params["lm_head"]["kernel"] if "lm_head" in params else params["embed"]["embedding"]
        result["lm_head"] = {"kernel": _round(head, 1, None, recipe, "lm_head")}
    return result | {"recipe": recipe}


def _quantize_layer(layer: Params, statistics: dict[str, jax.Array] | None, recipe: Recipe, name: str) -> Params:
    """Transforms one block, then rounds its weights."""
    for part in _INPUT_AXES:  # before transforms spread a NaN
        _check_finite(layer[part[0]][part[1]]["kernel"], f"{name}/{'/'.join(part)}")
    if recipe.smoothing == "mean":
        layer = smoothing.smooth_by_weights(layer)
    elif recipe.smoothing == "search" and statistics is not None:
        sizes = [
            _pick_group_size(layer[block][reader]["kernel"], _INPUT_AXES[block, reader], recipe, name)
            for block, reader in (("attention", "q"), ("attention", "o"), ("mlp", "gate"), ("mlp", "down"))
        ]
        layer, statistics = smoothing.smooth_by_search(layer, statistics, (sizes[0], sizes[1], sizes[2], sizes[3]))
    # Behind the smoothing: these scale whole rows of q and k, whose mean magnitudes "mean" reads.
    if recipe.keys == "fireq" and statistics is not None:
        layer = smoothing.scale_keys_as_fireq(layer, statistics["keys"], recipe.key_top_k)
    elif recipe.keys == "search" and statistics is not None:
        layer = smoothing.scale_keys_by_search(layer, statistics["keys"], statistics["query_energy"])
    quantized = {key: dict(value) if isinstance(value, Mapping) else value for key, value in layer.items()}
    for (block, projection), axes in _INPUT_AXES.items():
        hessian = None
        if recipe.rounding == "gptq" and statistics is not None:
            hessian = statistics[_INPUT_STATISTIC[block, projection]]
        weight = _round(layer[block][projection]["kernel"], axes, hessian, recipe, f"{name}/{block}/{projection}")
        quantized[block][projection] = {**layer[block][projection], "kernel": weight}
    return quantized


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
        for block, projection in _INPUT_AXES:
            if "kernel" not in params[name].get(block, {}).get(projection, {}):
                raise ValueError(f"params[{name!r}] lacks {block}/{projection}/kernel")


def _check_calibration(params: Mapping[str, Any], calibration: Mapping[str, Any]) -> None:
    for name in layer_names(params):
        for (block, projection), axes in _INPUT_AXES.items():
            k = math.prod(params[name][block][projection]["kernel"].shape[-axes:])
            statistic = _INPUT_STATISTIC[block, projection]
            found = calibration.get(name, {}).get(statistic)
            if found is None or found.shape != (k, k):
                shape = None if found is None else found.shape
                raise ValueError(
                    f"the calibration is not of this model: {name}/{statistic} must be {(k, k)}, is {shape}"
                )


def _check_finite(w: jax.Array, name: str) -> None:
    finite = _all_finite(w)
    if not isinstance(finite, jax.core.Tracer) and not bool(finite):
        raise ValueError(f"{name} holds NaN or infinity; the checkpoint is damaged")


@jax.jit
def _all_finite(w: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(w))


def _pick_group_size(w: jax.Array, input_axes: int, recipe: Recipe, name: str) -> int:
    k = math.prod(w.shape[-input_axes:])
    sizes = (recipe.group_size,) if isinstance(recipe.group_size, int) else recipe.group_size
    for size in sizes:
        if k % size == 0:
            return size
    divisors = ", ".join(str(g) for g in (128, 64, 32, 16) if k % g == 0) or "none of 128, 64, 32, 16"
    raise ValueError(f"{name}: {k=} is not divisible by group_size={recipe.group_size}; it is by {divisors}")


def _round(w: jax.Array, input_axes: int, hessian: jax.Array | None, recipe: Recipe, name: str) -> Int4Weight:
    group_size = _pick_group_size(w, input_axes, recipe, name)
    out_shape, in_shape = w.shape[:-input_axes], w.shape[-input_axes:]
    matrix = w.reshape(math.prod(out_shape), math.prod(in_shape))
    if hessian is None:
        parts = _round_nearest(matrix, group_size, recipe)
    else:
        parts = round_weight_calibrated(matrix, hessian, group_size, recipe)
    codes, scales, tensor_scale = parts
    return Int4Weight(codes, scales, tensor_scale, out_shape, in_shape, recipe.numerics, recipe.activations)


_round_nearest = jax.jit(round_weight, static_argnums=(1, 2))
