"""The e4m3 activations of a product, or what they are made of, for products that make them themselves."""

from dataclasses import dataclass
from functools import partial

import jax

_pytree = jax.tree_util.register_dataclass


@partial(_pytree, data_fields=["values", "scale", "flags"], meta_fields=[])
@dataclass(frozen=True)
class Rounded:
    """Rows in e4m3 already.

    Attributes:
      values: ``[..., k]`` e4m3.
      scale: ``[...]`` float32; the activations are ``values · scale``.
      flags: zeros ``[tiling.FLAGS]``, int32, for a product's blocks to tell each other what is done; None for a product
        to make them. Whoever makes rows has them almost for nothing, a kernel of their own takes longer than some
        products.
    """

    values: jax.Array
    scale: jax.Array
    flags: jax.Array | None = None

    def arrays(self) -> tuple[jax.Array, ...]:
        """What a kernel reads of it, rows first."""
        return self.values, self.scale

    def as_matrix(self, k: int) -> "Rounded":
        """The same with rows of k in one axis."""
        return Rounded(self.values.reshape(-1, k), self.scale.reshape(-1), self.flags)


@partial(_pytree, data_fields=["values"], meta_fields=[])
@dataclass(frozen=True)
class Unrounded:
    """Rows that are only rounded.

    Attributes:
      values: ``[..., k]`` float.
    """

    values: jax.Array

    def arrays(self) -> tuple[jax.Array, ...]:
        """What a kernel reads of it, rows first."""
        return (self.values,)

    def as_matrix(self, k: int) -> "Unrounded":
        """The same with rows of k in one axis."""
        return Unrounded(self.values.reshape(-1, k))


@partial(_pytree, data_fields=["values", "gain"], meta_fields=["eps"])
@dataclass(frozen=True)
class Unnormed:
    """Rows of which the RMS norm is rounded: ``x / sqrt(mean(x²) + eps) · gain``.

    Attributes:
      values: ``[..., k]`` float.
      gain: ``[k]`` float.
      eps: added to the mean of the squares.
    """

    values: jax.Array
    gain: jax.Array
    eps: float

    def arrays(self) -> tuple[jax.Array, ...]:
        """What a kernel reads of it, rows first."""
        return self.values, self.gain

    def as_matrix(self, k: int) -> "Unnormed":
        """The same with rows of k in one axis."""
        return Unnormed(self.values.reshape(-1, k), self.gain, self.eps)


@partial(_pytree, data_fields=["gate", "up"], meta_fields=[])
@dataclass(frozen=True)
class Ungated:
    """Rows of which ``silu(gate) · up`` is rounded.

    Attributes:
      gate: ``[..., k]`` float.
      up: ``[..., k]`` of the same dtype.
    """

    gate: jax.Array
    up: jax.Array

    def arrays(self) -> tuple[jax.Array, ...]:
        """What a kernel reads of it, rows first."""
        return self.gate, self.up

    def as_matrix(self, k: int) -> "Ungated":
        """The same with rows of k in one axis."""
        return Ungated(self.gate.reshape(-1, k), self.up.reshape(-1, k))


Source = Rounded | Unrounded | Unnormed | Ungated
