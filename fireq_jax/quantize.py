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

from fireq_jax.config import Recipe, resolve_recipe
from fireq_jax.numerics import round_weight
from fireq_jax.qtensor import Int4Weight, is_int4

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
    recipe: Recipe | str = "rtn",
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Params:
    """Rounds the linear weights of a Llama to INT4.

    Embedding, norms and (unless the recipe says otherwise) the output projection keep their dtype. The result is
    what the model, :func:`fireq_jax.generate` and :func:`fireq_jax.evaluate` take in place of float parameters.

    Args:
      params: float parameters as ``convert.load`` returns them or ``model.init`` makes them; not modified. The
        sizes of everything are read from the pytree.
      recipe: a :class:`Recipe` or the name of a preset (``fireq_jax.PRESETS``).
      progress: called with (weights done, weights in all).

    Returns:
      A pytree of the same structure, with an :class:`Int4Weight` for every quantised weight and the recipe under
      ``"recipe"`` (part of the structure, no array).

    Raises:
      ValueError: ``params`` is quantised already or is no Llama pytree, the preset is unknown, a weight holds NaN
        or infinity, or the group size does not divide a weight's input size. Under ``jax.jit`` values are not
        known and only the shapes are checked.
    """
    recipe = resolve_recipe(recipe)
    weights = _linear_weights(params, recipe)
    group_sizes = {name: _pick_group_size(w, axes, recipe, name) for name, (w, axes) in weights.items()}
    quantized: dict[str, Int4Weight] = {}
    for name, (w, axes) in weights.items():
        rounded, finite = _round(w, axes, group_sizes[name], recipe)
        if not isinstance(finite, jax.core.Tracer) and not bool(finite):
            raise ValueError(f"{name} holds NaN or infinity; the checkpoint is damaged")
        quantized[name] = rounded
        if progress is not None:
            progress(len(quantized), len(weights))
    return _replace(params, quantized) | {"recipe": recipe}


def _linear_weights(params: Mapping[str, Any], recipe: Recipe) -> dict[str, tuple[jax.Array, int]]:
    """Name -> (weight, number of input axes), for every weight to be quantised."""
    if recipe_of(params) is not None or any(is_int4(x) for x in jax.tree.leaves(params, is_leaf=is_int4)):
        known = recipe_of(params)
        raise ValueError(
            f"params are quantised already (recipe {known.name if known else 'unknown'!r}); "
            "quantize the float parameters they came from"
        )
    layers = layer_names(params)
    if not layers or "embed" not in params:
        raise ValueError(f"params are not those of a Llama: no 'embed' and 'layers_0' among {sorted(params)[:8]}")
    weights = {}
    for layer in layers:
        for (block, projection), axes in _INPUT_AXES.items():
            try:
                w = params[layer][block][projection]["kernel"]
            except KeyError as error:
                raise ValueError(f"params[{layer!r}] lacks {block}/{projection}/kernel") from error
            weights[f"{layer}/{block}/{projection}"] = (w, axes)
    if recipe.lm_head:
        head = params["lm_head"]["kernel"] if "lm_head" in params else params["embed"]["embedding"]
        weights["lm_head"] = (head, 1)
    return weights


def _pick_group_size(w: jax.Array, input_axes: int, recipe: Recipe, name: str) -> int:
    k = math.prod(w.shape[-input_axes:])
    sizes = (recipe.group_size,) if isinstance(recipe.group_size, int) else recipe.group_size
    for size in sizes:
        if k % size == 0:
            return size
    divisors = ", ".join(str(g) for g in (128, 64, 32, 16) if k % g == 0) or "none of 128, 64, 32, 16"
    raise ValueError(f"{name}: {k=} is not divisible by group_size={recipe.group_size}; it is by {divisors}")


@partial(jax.jit, static_argnums=(1, 2, 3))
def _round(w: jax.Array, input_axes: int, group_size: int, recipe: Recipe) -> tuple[Int4Weight, jax.Array]:
    out_shape, in_shape = w.shape[:-input_axes], w.shape[-input_axes:]
    matrix = w.reshape(math.prod(out_shape), math.prod(in_shape))
    codes, scales, tensor_scale = round_weight(matrix, group_size, recipe)
    weight = Int4Weight(codes, scales, tensor_scale, out_shape, in_shape, recipe.numerics, recipe.activations)
    return weight, jnp.all(jnp.isfinite(matrix))


def _replace(params: Mapping[str, Any], quantized: Mapping[str, Int4Weight]) -> Params:
    """A copy of the nested dicts of ``params`` (arrays are shared) with the named kernels replaced."""

    def copy(node: Any) -> Any:
        return {k: copy(v) for k, v in node.items()} if isinstance(node, Mapping) else node

    result = copy(params)
    for name, weight in quantized.items():
        node = result
        for key in name.split("/"):
            node = node.setdefault(key, {})
        node["kernel"] = weight
    return result
