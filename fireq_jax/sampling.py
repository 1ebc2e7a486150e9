"""Choosing the next token from logits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the default is greedy.

    The filters apply in the order temperature, top-k, top-p, as in transformers.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: keep only the k most likely tokens (all that tie with the k-th included); None keeps all.
      top_p: keep the smallest set of most likely tokens whose probabilities reach this sum; 1 keeps all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or positive")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or None to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]")


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Applies temperature, top-k and top-p: ``[batch, vocab]`` float32, -inf for tokens that are out."""
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits = _keep_largest(logits, jnp.ones_like(logits, jnp.int32), sampling.top_k)
    if sampling.top_p < 1:
        logits = _keep_largest(logits, jax.nn.softmax(logits, axis=-1), sampling.top_p)
    return logits


def _keep_largest(logits: jax.Array, weights: jax.Array, target: float) -> jax.Array:
    """The largest logits, as few as have weights of ``target`` together, and all that tie; -inf instead of the others.

    The smallest of them is found two bits at a time, since sorting a large vocabulary takes a GPU several times as
    long as 16 passes over it.
    """
    bits = jax.lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits), jnp.uint32)
    # In the order of the numbers, zeros of both signs the same.
    keys = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
    smallest = jnp.zeros((*logits.shape[:-1], 1), jnp.uint32)
    for shift in range(30, -1, -2):
        reached = [
            jnp.sum(jnp.where(keys >= smallest + jnp.uint32(step << shift), weights, 0), -1, keepdims=True) >= target
            for step in (1, 2, 3)
        ]
        smallest += sum(r.astype(jnp.uint32) for r in reached) << shift
    return jnp.where(keys < smallest, -jnp.inf, logits)


def sample(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws one token per sequence.

    Args:
      logits: ``[batch, vocab]`` float32.
      key: a PRNG key; row i draws with ``fold_in(key, i)``, whatever the batch size.
      sampling: static settings.

    Returns:
      ``[batch]`` int32.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, filter_logits(logits, sampling)).astype(jnp.int32)
