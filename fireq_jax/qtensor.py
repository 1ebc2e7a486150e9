"""The quantised leaf of a parameter pytree."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels import Numerics, dequantize_int4


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "tensor_scale"],
    meta_fields=["out_shape", "in_shape", "numerics", "activations"],
)
@dataclass(frozen=True)
class Int4Weight:
    """A linear weight ``W[n, k] ≈ codes · scales · tensor_scale``.

    Here n is the product of ``out_shape`` and k that of ``in_shape``: heads keep an axis of their own in the float
    weight this came from, and their sizes stay readable.

    Attributes:
      codes: ``[n, k / 2]`` uint8, packed int4 (:func:`pallas_kernels.pack_int4`).
      scales: ``[n, k / g]`` e4m3 or bf16, non-zero.
      tensor_scale: scalar float32, a power of two; 1 for bf16 scales.
      out_shape: logical output axes, e.g. ``(heads, head_dim)`` for q.
      in_shape: logical input axes, e.g. ``(heads, head_dim)`` for o.
      numerics: how the product is computed, see :func:`pallas_kernels.int4_fp8_matmul`.
      activations: "fp8" if the input is rounded to e4m3 per token, "none" if not.
    """

    codes: jax.Array
    scales: jax.Array
    tensor_scale: jax.Array
    out_shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    numerics: Numerics = "exact"
    activations: Literal["fp8", "none"] = "fp8"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the float weight this stands for."""
        return (*self.out_shape, *self.in_shape)

    @property
    def group_size(self) -> int:
        """Neighbours along k that share a scale."""
        return math.prod(self.in_shape) // self.scales.shape[-1]

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The weight as an array of ``shape``; exact in float32, rounded otherwise."""
        w = dequantize_int4(self.codes, self.scales, self.tensor_scale)
        return w.reshape(self.shape).astype(dtype)

    def validate(self, name: str = "weight") -> None:
        """Checks that the parts belong together.

        Raises:
          ValueError: a shape or dtype is not what the others ask for, or a scale is zero, NaN or infinite; the
            message names ``name``.
        """
        n, k = math.prod(self.out_shape), math.prod(self.in_shape)
        if self.codes.shape != (n, k // 2) or self.codes.dtype != jnp.uint8 or k % 2:
            raise ValueError(
                f"{name}: codes of {self.shape} must be uint8 {(n, k // 2)}, got {self.codes.dtype} {self.codes.shape}"
            )
        if self.scales.ndim != 2 or self.scales.shape[0] != n or k % max(self.scales.shape[1], 1):
            raise ValueError(f"{name}: scales must be [{n}, {k} / group_size], got {self.scales.shape}")
        if self.scales.dtype not in (jnp.float8_e4m3fn, jnp.bfloat16):
            raise ValueError(f"{name}: scales must be float8_e4m3fn or bfloat16, got {self.scales.dtype}")
        if self.tensor_scale.shape != () or self.tensor_scale.dtype != jnp.float32:
            raise ValueError(
                f"{name}: tensor_scale must be a float32 scalar, "
                f"got {self.tensor_scale.dtype} {self.tensor_scale.shape}"
            )
        scales = self.scales.astype(jnp.float32) * self.tensor_scale
        if not bool(jnp.all(jnp.isfinite(scales) & (scales != 0))):
            raise ValueError(f"{name}: a scale is zero, NaN or infinite")


def is_int4(leaf: object) -> bool:
    """Whether ``leaf`` is an :class:`Int4Weight`; for ``is_leaf`` in ``jax.tree.map``."""
    return isinstance(leaf, Int4Weight)
