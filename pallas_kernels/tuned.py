"""How a product is cut: as was fastest on this device where somebody measured it, and else by rules.

``examples/tune_matmul.py`` measures. Its tables lie in ``tuned/``, a file per device that says in ``"measured"`` where
its numbers come from. Each of its ``"classes"`` is a weight ``[n, k]`` in shares of so many bytes, a number of tokens
m, a kernel, and its :class:`Tiling` or :class:`Streaming`. It serves numbers of tokens down to the one before it; above
``FEW_TOKENS_OF_TILES``, where it matters how they divide into tiles, only those that fill as many times
``SIZES_APART``.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import rules
from pallas_kernels.tiling import FEW_TOKENS, FEW_TOKENS_OF_TILES, SIZES_APART, Streaming, Tiling
from pallas_kernels.weight_layout import SHARES

TABLES = Path(__file__).with_name("tuned")
KERNELS: dict[str, type[Streaming] | type[Tiling]] = {"matvec": Streaming, "matmul": Tiling}

Weight = tuple[int, int, int]  # outputs, inputs, bytes of a share
Cut = Streaming | Tiling


def device_name(kind: str) -> str:
    """What a device's table is called, such as h200 of "NVIDIA H200"."""
    model = re.search(r"[A-Z]+\d+", kind)
    return (model[0] if model else re.sub(r"\W+", "-", kind)).lower()


def kernel_of(cut: Cut) -> str:
    """The kernel that a cut belongs to."""
    return next(name for name, kind in KERNELS.items() if isinstance(cut, kind))


def as_class(weight: Weight, m: int, cut: Cut) -> dict[str, Any]:
    """A class of a table."""
    about = dict(zip(("n", "k", "share_bytes"), weight, strict=True))
    return about | {"m": m, "kernel": kernel_of(cut), "cut": dataclasses.asdict(cut)}


def of_class(row: Mapping[str, Any]) -> tuple[Weight, int, Cut]:
    """Inverse of :func:`as_class`."""
    return (row["n"], row["k"], row["share_bytes"]), row["m"], KERNELS[row["kernel"]](**row["cut"])


@functools.cache
def table(device: str) -> dict[Weight, list[tuple[int, Cut]]]:
    """Of each weight the numbers of tokens that were measured, upwards, and the fastest cut; empty for most devices."""
    path = TABLES / f"{device}.json"
    if not path.exists():
        return {}
    found: dict[Weight, list[tuple[int, Cut]]] = {}
    for row in json.loads(path.read_text("utf-8"))["classes"]:
        weight, m, cut = of_class(row)
        found.setdefault(weight, []).append((m, cut))
    return {weight: sorted(cuts, key=lambda pair: pair[0]) for weight, cuts in found.items()}


def measured_cut(m: int, weight: Weight) -> Cut | None:
    """What was fastest on the default device for as many tokens or some more; None if nobody knows."""
    cuts = table(device_name(jax.devices()[0].device_kind)).get(weight, [])
    tokens, found = next(((tokens, cut) for tokens, cut in cuts if m <= tokens), (0, None))
    fills = tokens <= FEW_TOKENS_OF_TILES or -(-m // SIZES_APART) == -(-tokens // SIZES_APART)
    return found if fills else None


def choose_tiling(m: int, n: int, k: int, tile_bytes: int) -> Tiling:
    """A tiling for ``[m, k] x [n, k]``."""
    cut = measured_cut(m, (n, k, tile_bytes // SHARES))
    return cut if isinstance(cut, Tiling) else rules.tiling_by_rule(m, n, k, tile_bytes)


def choose_streaming(m: int, n: int, k: int, share: int) -> Streaming | None:
    """How the kernel for few tokens cuts ``[m, k] x [n, k]``; None if it takes no such shape."""
    cut = measured_cut(m, (n, k, share)) if 1 <= m <= FEW_TOKENS else None
    return cut if isinstance(cut, Streaming) else rules.streaming_by_rule(m, n, k, share)


def choose_cut(m: int, n: int, k: int, share: int) -> Cut:
    """A cut of ``[m, k] x [n, k]``, of the kernel that is the faster one."""
    return measured_cut(m, (n, k, share)) or rules.cut_by_rule(m, n, k, share)
