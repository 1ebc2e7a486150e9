"""How much a float model's predictions depend on what each of its weights puts out.

If a weight's outputs are off by e for each token, the divergence of the model's predictions from the right ones is, to
second order, half of ``E[(gᵀ e)²]``, where g is the gradient of ``-log p(token)`` with respect to the outputs, for
tokens drawn from the model's own predictions (the Fisher information). Of g two second moments are kept: ``E[g gᵀ]``
says which outputs' errors add up and which cancel, and ``|g|²`` of each token how much it counts. So does YAQA (arXiv
2505.22988); weights of tokens are those of GuidedQuant (arXiv 2505.07004), less trusted.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fireq_jax.compiling import jit_untuned
from fireq_jax.config import LlamaConfig
from fireq_jax.differentiable import Params, block_output, ends, predictions
from fireq_jax.numerics import largest_divisor
from fireq_jax.streams import READERS

# Tokens of as many windows are differentiated at once, or those of one.
TOKENS_TOGETHER = 2048
# Outputs of which all pairs are considered; a weight with more has as many blocks of them as are needed.
MOST_OUTPUTS = 2048
# A token counts with this power of its |g|²: fully trusted, few tokens would decide.
TOKEN_EXPONENT = 0.5


class Curvature(NamedTuple):
    """Of a block.

    Attributes:
      outputs: per weight, by name, blocks of ``E[g gᵀ]``, ``[b, n / b, n / b]`` float32.
      importance: of each of :data:`fireq_jax.streams.READERS` how much a token counts, ``[windows, window]`` float32, 1
        in the mean.
    """

    outputs: dict[str, jax.Array]
    importance: dict[str, jax.Array]


def loss_curvature(
    config: LlamaConfig,
    params: Mapping[str, Any],
    layers: Mapping[str, Params],
    tokens: np.ndarray,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Curvature]:
    """Differentiates a float model over a text.

    Memory: the model; of ``TOKENS_TOGETHER`` tokens the inputs of all blocks, one block's attention over whole windows,
    and two arrays of logits; and per block the result, ``n · min(n, MOST_OUTPUTS)`` floats for each weight's n outputs.

    Args:
      config: the model.
      params: its float parameters.
      layers: its blocks by name, from the first one on, which may be transformed.
      tokens: ``[windows, window]`` int32.
      progress: called with the windows done.

    Returns:
      Of each block by name.
    """
    around = ends(params)
    moments = {name: _no_moments(config) for name in layers}
    energies: dict[str, list[dict[str, jax.Array]]] = {name: [] for name in layers}
    together = max(1, TOKENS_TOGETHER // tokens.shape[1])
    for start in range(0, len(tokens), together):
        x = around["embedding"][jnp.asarray(tokens[start : start + together])].astype(jnp.float32)
        inputs = {}
        for name, layer in layers.items():
            inputs[name] = x
            x = _forward(config, layer, x)
        gradient = _gradient_of_drawn(config, around, x, jax.random.key(start))
        for name, layer in reversed(list(layers.items())):
            gradient, moments[name], energy = _backward(config, layer, inputs.pop(name), gradient, moments[name])
            energies[name].append(energy)
        if progress is not None:
            progress(min(start + together, len(tokens)))
    return {
        name: Curvature(
            {weight: total / tokens.size for weight, total in moments[name].items()},
            {place: _importance([energy[place] for energy in energies[name]]) for place in READERS},
        )
        for name in layers
    }


def _outputs(config: LlamaConfig) -> dict[str, int]:
    """How many each weight of a block has."""
    heads, kv_heads = (number * config.head_dim for number in (config.num_heads, config.num_kv_heads))
    hidden, between = config.hidden_size, config.intermediate_size
    return {"q": heads, "k": kv_heads, "v": kv_heads, "o": hidden, "gate": between, "up": between, "down": hidden}


def _no_moments(config: LlamaConfig) -> dict[str, jax.Array]:
    sizes = {name: (n, largest_divisor(n, MOST_OUTPUTS)) for name, n in _outputs(config).items()}
    return {name: jnp.zeros((n // together, together, together)) for name, (n, together) in sizes.items()}


def _importance(energies: list[jax.Array]) -> jax.Array:
    counts = jnp.concatenate(energies) ** TOKEN_EXPONENT
    mean = jnp.mean(counts)
    return jnp.where(mean > 0, counts / mean, 1.0)


@partial(jit_untuned, static_argnums=0)
def _forward(config: LlamaConfig, layer: Params, x: jax.Array) -> jax.Array:
    return block_output(config, None, layer, x)


@partial(jit_untuned, static_argnums=0)
def _gradient_of_drawn(config: LlamaConfig, around: Params, x: jax.Array, key: jax.Array) -> jax.Array:
    """Of ``-log p`` of a token drawn for each position, with respect to the last block's output."""

    def loss(x: jax.Array) -> jax.Array:
        predicted = predictions(config, None, around, x)
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(predicted))
        return -jnp.sum(jnp.take_along_axis(predicted, drawn[..., None], axis=-1))

    return jax.grad(loss)(x)


@partial(jit_untuned, static_argnums=0, donate_argnums=4)
def _backward(
    config: LlamaConfig, layer: Params, x: jax.Array, gradient: jax.Array, moments: dict[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """The gradient with respect to a block's input, the sums with this batch's in them, and each token's |g|²."""
    sizes = _outputs(config)

    def with_errors(x: jax.Array, errors: dict[str, jax.Array]) -> jax.Array:
        halves = {
            half: {
                name: {**part, "error": errors[name]} if name in sizes else part for name, part in layer[half].items()
            }
            for half in ("attention", "mlp")
        }
        return block_output(config, None, {**layer, **halves}, x)

    none = {name: jnp.zeros((*x.shape[:2], n)) for name, n in sizes.items()}
    _, pull_back = jax.vjp(with_errors, x, none)
    gradient, of_outputs = pull_back(gradient)
    sums = {}
    for name, total in moments.items():
        g = of_outputs[name].reshape(-1, *total.shape[:2])
        sums[name] = total + jnp.einsum("tbn,tbm->bnm", g, g, precision=jax.lax.Precision.HIGHEST)
    energy = {
        place: jnp.sum(jnp.stack([jnp.sum(jnp.square(of_outputs[name]), axis=-1) for name in names]), axis=0)
        for place, (_, names) in READERS.items()
    }
    return gradient, sums, energy
