"""How an operation's implementation is chosen.

``implementation`` is a name, or None for the best one that supports the device and the shapes. A name that cannot
be honoured is refused before anything is traced.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

# Per operation, the implementations from the most to the least specialised; None takes the first that fits.
_OPERATIONS: dict[str, dict[str, Callable[..., Any]]] = {}


def register(op: str, **computations: Callable[..., Any]) -> None:
    """Makes an operation known, with its implementations from the most to the least specialised.

    Those of Pallas import it only when they are called: Mosaic takes a second, which only who runs a kernel should pay.
    """
    _OPERATIONS[op] = computations


def implementations(op: str) -> tuple[str, ...]:
    """Names of the implementations of ``op``, the most specialised first.

    Raises:
      ValueError: there is no such operation.
    """
    if op not in _OPERATIONS:
        raise ValueError(f"unknown operation {op!r}; known: {sorted(_OPERATIONS)}")
    return tuple(_OPERATIONS[op])


def select(op: str, implementation: str | None, refusals: Mapping[str, str] | None = None) -> Callable[..., Any]:
    """The function that computes ``op``.

    Args:
      op: an operation.
      implementation: a name, or None for the first that is not in ``refusals``.
      refusals: implementations that cannot take this shape or device, and why.

    Raises:
      ValueError: there is no such operation.
      NotImplementedError: ``op`` has no implementation of that name, or it is in ``refusals``.
    """
    names, refusals = implementations(op), refusals or {}
    if implementation is None:
        return _OPERATIONS[op][next(name for name in names if name not in refusals)]
    if implementation not in names:
        raise NotImplementedError(
            f"{op} has no {implementation!r} implementation; it has {', '.join(names)}. "
            "Pass implementation=None to take the best of them."
        )
    if implementation in refusals:
        raise NotImplementedError(
            f"{op}: {implementation} cannot run: {refusals[implementation]}. Pass implementation=None to fall back."
        )
    return _OPERATIONS[op][implementation]


def has_hopper_gpu() -> bool:
    """Whether the default device is an NVIDIA GPU of compute capability 9.0 (H100, H200)."""
    device = jax.devices()[0]
    return device.platform in ("gpu", "cuda") and getattr(device, "compute_capability", None) == "9.0"


def no_hopper() -> str | None:
    """Why no Hopper kernel can run, if none can."""
    return None if has_hopper_gpu() else f"the default device, {jax.devices()[0]}, is no Hopper GPU"


def refused(reasons: Mapping[str, str | None]) -> dict[str, str]:
    """For :func:`select`, of the implementations those that there is a reason against."""
    return {name: reason for name, reason in reasons.items() if reason is not None}


def require(op: str, name: str, array: jax.Array, shape: tuple[int, ...], dtypes: tuple[Any, ...]) -> None:
    """Checks an argument of an operation.

    Raises:
      ValueError: it has another shape, or none of the dtypes.
    """
    if array.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {array.shape}")
    if array.dtype not in [jnp.dtype(d) for d in dtypes]:
        expected = " or ".join(jnp.dtype(d).name for d in dtypes)
        raise ValueError(f"{op}: {name} must be {expected}, got {array.dtype}")
