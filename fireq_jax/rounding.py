"""Rounding a weight with regard to what its inputs look like.

With ``H = E[x xᵀ]`` the mean squared error of an output is ``e H eᵀ`` for the weight error e. Group scales are searched
for the smallest such error inside the group, and GPTQ (arXiv 2210.17323) rounds column after column, each time moving
the error made so far onto columns that are still to be rounded. The grid is the one the kernel computes with: scales
rounded to their storage type, codes from -8 to 7.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fireq_jax.compiling import jit_untuned
from fireq_jax.config import Recipe
from fireq_jax.numerics import E4M3_TINY, group_absmax, largest_divisor, store_scales, to_grid
from pallas_kernels import INT4_MAX, INT4_MIN, pack_int4, round_to_bf16, round_to_e4m3

# Candidates for a group scale, as fractions of the one that clips nothing.
SCALE_FRACTIONS = tuple(0.5 + 0.04 * i for i in range(14))
# Added to the diagonal of H, as a fraction of its mean: H can be inverted, and what a short text says about rare
# directions is not believed too much.
DAMPING = 0.1
# The same for the curvature of outputs, which is made of one drawn token for each token of the text.
OUTPUT_DAMPING = 0.3
# Parts of a weight's outputs that are rounded one after another.
OUTPUT_PARTS = 16
# How far a weight is moved to make up for the error of its inputs (1 would be least squares on the calibration text,
# which does not carry over to other texts), and the damping of that step.
CORRECTION = 0.25
CORRECTION_DAMPING = 0.01
# Entries of a weight whose group scales are searched at the same time.
SEARCHED_ENTRIES = 1 << 22
HIGHEST = jax.lax.Precision.HIGHEST


def search_scales(
    w: jax.Array, hessian: jax.Array | None, group_size: int, recipe: Recipe
) -> tuple[jax.Array, jax.Array]:
    """Group scales of the smallest output error under round-to-nearest.

    A scale may be negative: then the entry of largest magnitude, if it is positive, takes code -8, and the grid reaches
    further on its side.

    Args:
      w: ``[n, k]`` float.
      hessian: ``[k, k]`` float32; None takes the error of the weight instead.
      group_size: divides k.
      recipe: its ``scales``, ``tensor_scale`` and ``numerics`` count.

    Returns:
      scales ``[n, k / group_size]`` in the recipe's storage type and the scalar float32 tensor_scale.
    """
    n, k = w.shape
    groups = k // group_size
    blocks = None
    if hessian is not None:
        blocks = hessian.reshape(groups, group_size, groups, group_size)[jnp.arange(groups), :, jnp.arange(groups)]
    # All candidates are at most this, so the tensor scale that suits it suits them.
    stored, tensor_scale = store_scales(group_absmax(w, group_size) / INT4_MAX, recipe)

    def store(scale: jax.Array) -> jax.Array:
        if recipe.scales == "sigma_bf16":
            return round_to_bf16(scale).astype(jnp.bfloat16)
        magnitude = jnp.maximum(jnp.abs(scale) / tensor_scale, E4M3_TINY)
        return round_to_e4m3(jnp.sign(scale) * magnitude)

    def search(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
        grouped, stored = rows[0].astype(jnp.float32).reshape(-1, groups, group_size), rows[1]
        largest = jnp.max(jnp.abs(grouped), axis=-1)
        lowest, highest = jnp.min(grouped, axis=-1), jnp.max(grouped, axis=-1)
        toward = jnp.where(highest > -lowest, -1.0, 1.0)  # sign that puts the largest magnitude on code -8

        def error(candidate: jax.Array) -> jax.Array:
            step = (candidate.astype(jnp.float32) * tensor_scale)[..., None]
            e = grouped - to_grid(grouped, step) * step
            if blocks is None:
                return jnp.sum(jnp.square(e), axis=-1)
            return jnp.einsum("ngi,gij,ngj->ng", e, blocks, e, precision=HIGHEST)

        def better(best: tuple[jax.Array, jax.Array], fraction: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            for scale in (largest / INT4_MAX, toward * largest / -INT4_MIN):
                candidate = store(jnp.where(largest > 0, scale * fraction, stored.astype(jnp.float32) * tensor_scale))
                found = error(candidate)
                improves = found < best[1]
                best = jnp.where(improves, candidate, best[0]), jnp.where(improves, found, best[1])
            return best, None

        fractions = jnp.asarray([1.0 + 1.0 / 16, *reversed(SCALE_FRACTIONS)], jnp.float32)
        (scales, _), _ = jax.lax.scan(better, (stored, error(stored)), fractions)
        return scales

    # Rows do not depend on each other, and taking a few million entries at a time keeps the memory small.
    rows = largest_divisor(n, max(1, SEARCHED_ENTRIES // k))
    if rows == n:
        return search((w, stored)), tensor_scale
    chunks = (w.reshape(-1, rows, k), stored.reshape(-1, rows, groups))
    return jax.lax.map(search, chunks).reshape(n, groups), tensor_scale


def damped(moments: jax.Array, by: float = DAMPING) -> jax.Array:
    """Second moments with a share of their mean on the diagonal, positive definite even for what is always zero."""
    mean = jnp.mean(jnp.diagonal(moments))
    return moments + jnp.where(mean > 0, by * mean, 1.0) * jnp.eye(moments.shape[0])


@jit_untuned
def corrected_weight(w: jax.Array, hessian: jax.Array, cross: jax.Array) -> jax.Array:
    """Moves a weight so that it gives more nearly the float outputs on inputs that carry the error of earlier layers.

    With float inputs X and quantised ones X̂, ``‖X wᵀ - X̂ w'ᵀ‖²`` is least at ``w' = w + w (XᵀX̂ - X̂ᵀX̂)(X̂ᵀX̂)⁻¹``, the
    idea of GPTAQ (arXiv 2504.02692). Of that step a share of ``CORRECTION`` is taken.

    Args:
      w: ``[n, k]`` float32.
      hessian: ``[k, k]`` float32, ``E[x̂ x̂ᵀ]``.
      cross: ``[k, k]`` float32, ``E[x x̂ᵀ]``.

    Returns:
      ``[n, k]`` float32.
    """
    mean = jnp.mean(jnp.diagonal(hessian))
    inner = hessian + jnp.where(mean > 0, CORRECTION_DAMPING * mean, 1.0) * jnp.eye(hessian.shape[0])
    missing = jnp.matmul(w, cross - hessian, precision=HIGHEST)
    return w + CORRECTION * jax.scipy.linalg.solve(inner, missing.T, assume_a="pos").T


class _Columns(NamedTuple):
    """How GPTQ goes through the columns of a weight.

    Attributes:
      order: of the columns, those of the largest second moment first, ``[k]``.
      upper: ``[k, k]``; row i says how an error in the i-th column of that order is spread over the columns behind it.
    """

    order: jax.Array
    upper: jax.Array


def _columns(hessian: jax.Array) -> _Columns:
    order = jnp.argsort(-jnp.diagonal(hessian))
    return _Columns(order, _spread(hessian[order][:, order]))


def _spread(moments: jax.Array) -> jax.Array:
    """The upper factor u with ``uᵀ u = moments⁻¹``."""
    inverse = jnp.linalg.inv(moments)
    return jnp.linalg.cholesky((inverse + inverse.T) / 2).T


def gptq(w: jax.Array, hessian: jax.Array, step: jax.Array) -> jax.Array:
    """Error-compensated rounding, columns of the largest second moment first.

    Args:
      w: ``[n, k]`` float32.
      hessian: ``[k, k]`` float32, positive definite.
      step: ``[n, k]`` float32, every entry's grid step; non-zero.

    Returns:
      codes ``[n, k]`` int8.
    """
    return _gptq(w, _columns(hessian), step)


def gptq_across_outputs(w: jax.Array, hessian: jax.Array, step: jax.Array, curvature: jax.Array) -> jax.Array:
    """:func:`gptq` that makes up for the error of some outputs by others, too.

    With the errors E of a weight what is to be small is ``tr(C E H Eᵀ)``, where C says how much errors of two outputs
    cost together. With the first rows rounded, and whatever H, the rest of E is best at ``E_R = -C_RR⁻¹ C_RP E_P``:
    their targets are moved there. Rows of the largest ``C_ii`` come first, ``OUTPUT_PARTS`` parts one after another, of
    which each is rounded by :func:`gptq`. The two-sided rounding of YAQA (arXiv 2505.22988), with its finest steps
    replaced by these parts.

    Args:
      w: ``[n, k]`` float32.
      hessian: ``[k, k]`` float32, positive definite.
      step: ``[n, k]`` float32, every entry's grid step; non-zero.
      curvature: ``[b, n / b, n / b]`` float32, the blocks of a block-diagonal C, each positive definite.

    Returns:
      codes ``[n, k]`` int8.
    """
    columns, k = _columns(hessian), w.shape[1]
    blocks, rows, _ = curvature.shape
    each = largest_divisor(rows, -(-rows // OUTPUT_PARTS))

    def round_block(w: jax.Array, step: jax.Array, curvature: jax.Array) -> jax.Array:
        order = jnp.argsort(-jnp.diagonal(curvature))
        upper, steps = _spread(curvature[order][:, order]), step[order]

        def round_part(targets: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
            target = jax.lax.dynamic_slice(targets, (start, 0), (each, k))
            its_steps = jax.lax.dynamic_slice(steps, (start, 0), (each, k))
            codes = _gptq(target, columns, its_steps)
            spread = jax.lax.dynamic_slice(upper, (start, 0), (each, rows))
            among = jax.lax.dynamic_slice(spread, (0, start), (each, each))
            errors = jax.scipy.linalg.solve_triangular(among.T, target - codes * its_steps, lower=True)
            behind = jnp.where(jnp.arange(rows) >= start + each, spread, 0.0)
            return targets - jnp.matmul(behind.T, errors, precision=HIGHEST), codes

        _, codes = jax.lax.scan(round_part, w[order], jnp.arange(0, rows, each))
        return codes.reshape(rows, k)[jnp.argsort(order)]

    return jax.vmap(round_block)(w.reshape(blocks, rows, k), step.reshape(blocks, rows, k), curvature).reshape(w.shape)


def _gptq(w: jax.Array, its: _Columns, step: jax.Array) -> jax.Array:
    n, k = w.shape
    size = next(b for b in (128, 96, 64, 32, 16, 8, 4, 2, 1) if k % b == 0)
    w, step, upper = w[:, its.order], step[:, its.order], its.upper
    columns = jnp.arange(size)

    def round_block(carry: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        w, codes = carry
        factor = jax.lax.dynamic_slice(upper, (start, start), (size, size))
        steps = jax.lax.dynamic_slice(step, (0, start), (n, size))

        def round_column(
            i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            block, codes, errors = state
            code = to_grid(block[:, i], steps[:, i])
            e = (block[:, i] - code * steps[:, i]) / factor[i, i]
            block = block - e[:, None] * jnp.where(columns > i, factor[i], 0.0)
            return block, codes.at[:, i].set(code), errors.at[:, i].set(e)

        block = jax.lax.dynamic_slice(w, (0, start), (n, size))
        zeros = jnp.zeros_like(block)
        _, block_codes, errors = jax.lax.fori_loop(0, size, round_column, (block, zeros, zeros))
        behind = jnp.where(jnp.arange(k) >= start + size, jax.lax.dynamic_slice(upper, (start, 0), (size, k)), 0.0)
        w = w - jnp.matmul(errors, behind, precision=HIGHEST)
        return (w, jax.lax.dynamic_update_slice(codes, block_codes, (0, start))), None

    starts = jnp.arange(0, k, size)
    (_, codes), _ = jax.lax.scan(round_block, (w, jnp.zeros_like(w)), starts)
    return codes[:, jnp.argsort(its.order)].astype(jnp.int8)


@partial(jax.jit, static_argnums=(1, 2))
def round_weight_searched(w: jax.Array, group_size: int, recipe: Recipe) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scales searched for the smallest error of the weight, and nearest codes.

    Args:
      w: ``[n, k]`` float.
      group_size: divides k.
      recipe: how scales are stored.

    Returns:
      As :func:`fireq_jax.numerics.round_weight`; scales may be negative.
    """
    scales, tensor_scale = search_scales(w, None, group_size, recipe)
    step = scales.astype(jnp.float32) * tensor_scale
    codes = to_grid(w.astype(jnp.float32).reshape(*scales.shape, group_size), step[..., None])
    return pack_int4(codes.astype(jnp.int8).reshape(w.shape)), scales, tensor_scale


@partial(jit_untuned, static_argnums=(2, 3))
def round_weights_calibrated(
    weights: tuple[jax.Array, ...],
    hessian: jax.Array,
    group_size: int,
    recipe: Recipe,
    curvatures: tuple[jax.Array, ...] | None = None,
) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """Searched scales, and nearest or error-compensated codes, of weights that read the same input.

    Args:
      weights: each ``[n, k]`` float.
      hessian: ``[k, k]`` float32, second moments of the input.
      group_size: divides k.
      recipe: how scales are stored, and whether codes are error-compensated.
      curvatures: of each weight what :func:`gptq_across_outputs` takes, but for the damping; None to compensate within
        a row alone.

    Returns:
      For each as :func:`fireq_jax.numerics.round_weight`; scales may be negative.
    """
    hessian = damped(hessian)
    matrices = [w.astype(jnp.float32) for w in weights]
    scales = [search_scales(w, hessian, group_size, recipe) for w in matrices]
    steps = [jnp.repeat(s.astype(jnp.float32) * tensor_scale, group_size, axis=1) for s, tensor_scale in scales]
    ends = np.cumsum([w.shape[0] for w in weights])[:-1]
    # Rows are rounded independently of each other, so all weights can share one walk over the columns.
    rows, steps_of_rows = jnp.concatenate(matrices), jnp.concatenate(steps)
    if recipe.rounding != "gptq":
        split = jnp.split(to_grid(rows, steps_of_rows).astype(jnp.int8), ends)
    elif curvatures is None:
        split = jnp.split(gptq(rows, hessian, steps_of_rows), ends)
    else:
        split = _gptq_with_curvatures(matrices, hessian, steps, curvatures)
    return [(pack_int4(codes), *stored) for codes, stored in zip(split, scales, strict=True)]


def _gptq_with_curvatures(
    matrices: Sequence[jax.Array], hessian: jax.Array, steps: Sequence[jax.Array], curvatures: Sequence[jax.Array]
) -> list[jax.Array]:
    """Codes of each weight; those whose blocks of outputs are of one size share a walk over the columns."""
    codes: dict[int, jax.Array] = {}
    for size in sorted({curvature.shape[1] for curvature in curvatures}):
        which = [i for i, curvature in enumerate(curvatures) if curvature.shape[1] == size]
        blocks = jnp.concatenate([curvatures[i] for i in which])
        together = gptq_across_outputs(
            jnp.concatenate([matrices[i] for i in which]), hessian, jnp.concatenate([steps[i] for i in which]),
            jax.vmap(partial(damped, by=OUTPUT_DAMPING))(blocks),
        )  # fmt: skip
        ends = np.cumsum([matrices[i].shape[0] for i in which])[:-1]
        codes |= dict(zip(which, jnp.split(together, ends), strict=True))
    return [codes[i] for i in range(len(matrices))]
