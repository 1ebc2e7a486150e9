"""Static key/value caches: arrays of a fixed capacity that a compiled loop updates in place."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fireq_jax.config import LlamaConfig
from pallas_kernels import write_rows
from pallas_kernels.tiling import DECODE_SLOTS


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k_codes", "k_scales", "v_codes", "v_scales"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Int4LayerCache:
    """Keys and values of one layer as int4: ``k ≈ k_codes · k_scales``, one scale per token and kv head.

    Attributes:
      k_codes: ``[batch, kv heads, slots, head_dim / 2]`` uint8, packed int4.
      k_scales: ``[batch, kv heads, slots]`` bf16.
      v_codes: as k_codes.
      v_scales: as k_scales.
    """

    k_codes: jax.Array
    k_scales: jax.Array
    v_codes: jax.Array
    v_scales: jax.Array

    @classmethod
    def zeros(cls, config: LlamaConfig, batch: int, capacity: int) -> "Int4LayerCache":
        """An empty cache; of as many slots as the Hopper kernel takes, the next multiple of 8."""
        rows = (batch, config.num_kv_heads, -(-capacity // DECODE_SLOTS) * DECODE_SLOTS)

        def empty() -> tuple[jax.Array, jax.Array]:
            return jnp.zeros((*rows, config.head_dim // 2), jnp.uint8), jnp.zeros(rows, jnp.bfloat16)

        return cls(*empty(), *empty())

    def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The four arrays, in the order in which the kernels take them."""
        return self.k_codes, self.k_scales, self.v_codes, self.v_scales


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=[])
@dataclass(frozen=True)
class FloatLayerCache:
    """Keys and values of one layer in the model's dtype, ``[batch, kv heads, capacity, head_dim]`` each."""

    k: jax.Array
    v: jax.Array

    @classmethod
    def zeros(cls, config: LlamaConfig, batch: int, capacity: int, dtype: Any) -> "FloatLayerCache":
        """An empty cache."""
        shape = (batch, config.num_kv_heads, capacity, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def append(self, k: jax.Array, v: jax.Array, starts: jax.Array, lengths: jax.Array) -> "FloatLayerCache":
        """Writes ``[batch, t, kv heads, head_dim]`` keys (already rotated) and values.

        Args:
          k: keys.
          v: values.
          starts: ``[batch]`` int32, tokens each sequence already has.
          lengths: ``[batch]`` int32, how many of the t tokens are real.
        """
        return FloatLayerCache(
            write_rows(self.k, k.astype(self.k.dtype), starts, lengths),
            write_rows(self.v, v.astype(self.v.dtype), starts, lengths),
        )

    def filled(self, k: jax.Array, v: jax.Array) -> "FloatLayerCache":
        """Writes the first tokens of all sequences, padding included, which later tokens overwrite.

        A copy, where :meth:`append` is a scatter, which XLA is slow at on a GPU.

        Args:
          k: ``[batch, t, kv heads, head_dim]`` keys, already rotated; what the cache has no slots for is left out.
          v: values.
        """

        def fill(cache: jax.Array, rows: jax.Array) -> jax.Array:
            rows = rows[:, : cache.shape[2]].swapaxes(1, 2).astype(cache.dtype)
            return jax.lax.dynamic_update_slice(cache, rows, (0, 0, 0, 0))

        return FloatLayerCache(fill(self.k, k), fill(self.v, v))


LayerCache = Int4LayerCache | FloatLayerCache
CacheKind = Literal["int4", "float"]


def empty_layer_cache(config: LlamaConfig, batch: int, capacity: int, kind: CacheKind, dtype: Any) -> LayerCache:
    """One layer's part of :meth:`KVCache.zeros`."""
    if kind == "int4":
        return Int4LayerCache.zeros(config, batch, capacity)
    return FloatLayerCache.zeros(config, batch, capacity, dtype)


@partial(jax.tree_util.register_dataclass, data_fields=["layers", "lengths"], meta_fields=[])
@dataclass(frozen=True)
class KVCache:
    """All layers' caches and how many tokens each sequence has in them.

    Attributes:
      layers: one per decoder block.
      lengths: ``[batch]`` int32.
    """

    layers: tuple[LayerCache, ...]
    lengths: jax.Array

    @classmethod
    def zeros(
        cls,
        config: LlamaConfig,
        batch: int,
        capacity: int,
        kind: CacheKind = "int4",
        dtype: Any = jnp.bfloat16,
    ) -> "KVCache":
        """An empty cache.

        Args:
          config: the model's sizes.
          batch: sequences.
          capacity: tokens per sequence, in an INT4 cache rounded up to a multiple of 8.
          kind: "int4", or "float" for ``dtype``.
          dtype: of a float cache.

        Raises:
          ValueError: ``kind`` is unknown, or ``capacity`` is not positive or beyond the model's positions.
        """
        if not 1 <= capacity <= config.max_positions:
            raise ValueError(f"{capacity=} must be between 1 and the model's {config.max_positions} positions")
        if kind not in ("int4", "float"):
            raise ValueError(f"cache {kind=} must be 'int4' or 'float'")

        layers = tuple(empty_layer_cache(config, batch, capacity, kind, dtype) for _ in range(config.num_layers))
        return cls(layers, jnp.zeros(batch, jnp.int32))

    @property
    def capacity(self) -> int:
        """Tokens per sequence that fit."""
        return jax.tree.leaves(self.layers[0])[0].shape[2]

    def advanced(self, layers: tuple[LayerCache, ...], lengths: jax.Array) -> "KVCache":
        """The cache after ``lengths`` more tokens were written into ``layers``."""
        return replace(self, layers=layers, lengths=self.lengths + lengths)


def cache_bytes_per_token(config: LlamaConfig, kind: CacheKind, dtype: Any = jnp.bfloat16) -> int:
    """Bytes that one token of one sequence takes in all layers of a cache."""
    shapes = jax.eval_shape(lambda: empty_layer_cache(config, 1, DECODE_SLOTS, kind, dtype))
    return config.num_layers * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)) // DECODE_SLOTS
