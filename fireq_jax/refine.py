"""A last step behind rounding: the quantised model's gains are tuned until it predicts more like the float model.

What is trained is small and costs nothing at run time: the gains of the RMS norms and the scales that the rotation
applies to queries and keys. Codes and group scales stay; training those on a text as short as a calibration's was
measured to carry over to other texts less well.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fireq_jax.compiling import jit_untuned
from fireq_jax.config import LlamaConfig, Recipe
from fireq_jax.differentiable import log_probabilities, stacked

Params = dict[str, Any]
EPOCHS = 3
WINDOWS_PER_STEP = 4
LEARNING_RATE = 1e-3


def refinement_steps(tokens: np.ndarray) -> int:
    """How many steps :func:`refine_gains` takes on ``[windows, window]`` tokens."""
    return EPOCHS * -(-len(tokens) // WINDOWS_PER_STEP)


def refine_gains(
    config: LlamaConfig,
    params: Mapping[str, Any],
    quantized: Mapping[str, Any],
    tokens: np.ndarray,
    recipe: Recipe,
    progress: Callable[[int], None] | None = None,
) -> Params:
    """Minimises ``KL(float model || quantised model)`` over a text by Adam, rounding straight-through.

    Every gain g becomes ``g · exp(δ)`` and δ is trained, with a learning rate that falls from ``LEARNING_RATE`` to 0
    along a cosine. Activations, keys and values are rounded as at run time; the gradient takes each rounding for the
    identity. Blocks are recomputed in the backward pass. Memory: both models, one block's float weights, and the
    hidden states and two arrays of logits of ``WINDOWS_PER_STEP`` windows.

    Args:
      config: the model.
      params: its float parameters.
      quantized: the same, quantised.
      tokens: ``[windows, window]`` int32.
      recipe: of ``quantized``.
      progress: called with the steps done.

    Returns:
      ``quantized`` with refined gains.
    """
    # By number: a pytree that went through jax.tree.map has "layers_10" before "layers_2".
    names = [f"layers_{i}" for i in range(config.num_layers)]
    float_model, rounded_model = stacked(params, names), stacked(quantized, names)
    deltas = jax.tree.map(jnp.zeros_like, _gains(rounded_model))
    steps = refinement_steps(tokens)
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    state = optimizer.init(deltas)
    order = np.random.default_rng(0)
    done = 0
    for _ in range(EPOCHS):
        shuffled = order.permutation(len(tokens))
        for start in range(0, len(tokens), WINDOWS_PER_STEP):
            batch = jnp.asarray(tokens[shuffled[start : start + WINDOWS_PER_STEP]])
            deltas, state = _step(config, recipe, optimizer.update, float_model, rounded_model, deltas, state, batch)
            done += 1
            if progress is not None:
                progress(done)
    refined = _with_gains(rounded_model, deltas)
    result = {**quantized, "final_norm": refined["final_norm"]}
    for i, name in enumerate(names):
        gains = jax.tree.map(lambda x, i=i: x[i], _gains(refined)["blocks"])
        layer = quantized[name]
        attention = {**layer["attention"], **{key: gains[key] for key in gains.keys() & {"post_rope_scale"}}}
        norms = {key: {"scale": gains[key]} for key in ("input_norm", "post_attention_norm")}
        result[name] = {**layer, **norms, "attention": attention}
    return result


def _gains(model: Params) -> Params:
    blocks = model["blocks"]
    gains = {name: blocks[name]["scale"] for name in ("input_norm", "post_attention_norm")}
    if "post_rope_scale" in blocks["attention"]:
        gains["post_rope_scale"] = blocks["attention"]["post_rope_scale"]
    return {"blocks": gains, "final_norm": model["final_norm"]["scale"]}


def _with_gains(model: Params, deltas: Params) -> Params:
    def scaled(gain: jax.Array, delta: jax.Array) -> jax.Array:
        return (gain.astype(jnp.float32) * jnp.exp(delta)).astype(gain.dtype)

    gains = jax.tree.map(scaled, _gains(model), deltas)
    blocks = dict(model["blocks"])
    for name in ("input_norm", "post_attention_norm"):
        blocks[name] = {"scale": gains["blocks"][name]}
    if "post_rope_scale" in gains["blocks"]:
        blocks["attention"] = {**blocks["attention"], "post_rope_scale": gains["blocks"]["post_rope_scale"]}
    return {**model, "blocks": blocks, "final_norm": {"scale": gains["final_norm"]}}


@partial(jit_untuned, static_argnums=(0, 1, 2), donate_argnums=(5, 6))
def _step(
    config: LlamaConfig,
    recipe: Recipe,
    update: Callable[..., Any],
    float_model: Params,
    rounded_model: Params,
    deltas: Params,
    state: Any,
    batch: jax.Array,
) -> tuple[Params, Any]:
    target = jax.lax.stop_gradient(log_probabilities(config, None, float_model, batch))

    def loss(deltas: Params) -> jax.Array:
        predicted = log_probabilities(config, recipe, _with_gains(rounded_model, deltas), batch)
        return jnp.mean(jnp.sum(jnp.exp(target) * (target - predicted), axis=-1))

    updates, state = update(jax.grad(loss)(deltas), state, deltas)
    return optax.apply_updates(deltas, updates), state
