"""Compilation of what runs only some times, such as the steps of calibrating and quantising."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax

# Products as cuBLAS has them. XLA otherwise compiles and times dozens of kernels for each shape of a float32 product.
UNTUNED = {"xla_gpu_enable_triton_gemm": False}


def jit_untuned[**P, R](function: Callable[P, R], **options: Any) -> Callable[P, R]:
    """``jax.jit`` without XLA's search for the fastest kernel of each product, which pays off for many calls alone.

    Args:
      function: to compile.
      options: as of ``jax.jit``, but ``compiler_options``.

    Returns:
      The compiled function. Under an outer ``jax.jit``, which says how all within it is compiled, or another
      transformation, it is ``jax.jit(function, **options)``.
    """
    within = jax.jit(function, **options)
    alone = jax.jit(function, compiler_options=UNTUNED, **options)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs)))
        compiled: Callable[P, R] = within if traced else alone
        return compiled(*args, **kwargs)

    return call
