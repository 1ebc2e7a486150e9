"""Tables of measured cuts: how they are made, read, and obeyed."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from kernel_oracles import E4M3, matmul, matvec

from pallas_kernels import rules, tiling, tuned, weight_layout
from pallas_kernels.tiling import Streaming, Tiling

ROOT = Path(__file__).parents[1]
SHARE = weight_layout.share_bytes(128, E4M3)
WEIGHT = (6144, 4096, SHARE)
CUTS = {4: Streaming(3, 8, 4, True), 16: Tiling(16, 4, halves=1, unroll=2, persistent=False), 256: Tiling(128, 6)}


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    yield
    for name in ("tuning_candidates", "tuning_report", "pages"):
        sys.modules.pop(name, None)


@pytest.fixture
def on_a_measured_device(monkeypatch, tmp_path):
    classes = [tuned.as_class(WEIGHT, m, cut) for m, cut in reversed(CUTS.items())]
    (tmp_path / "h300.json").write_text(json.dumps({"measured": {}, "classes": classes}))
    monkeypatch.setattr(tuned, "TABLES", tmp_path)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="NVIDIA H300 96GB")])
    tuned.table.cache_clear()
    yield
    tuned.table.cache_clear()


@pytest.mark.parametrize("kind", ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "cpu", "TFRT_CPU", "Radeon (TM) Pro"])
def test_names_of_tables(kind):
    name = {"NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100"}.get(kind)
    assert tuned.device_name(kind) == name if name else tuned.device_name(kind).isprintable()
    assert "/" not in tuned.device_name(kind)
    assert " " not in tuned.device_name(kind)


@pytest.mark.parametrize("cut", CUTS.values())
def test_a_class_keeps_its_cut(cut):
    row = json.loads(json.dumps(tuned.as_class(WEIGHT, 7, cut)))
    assert tuned.of_class(row) == (WEIGHT, 7, cut)


def test_measured_cuts_come_before_rules(on_a_measured_device):
    n, k, _ = WEIGHT
    for m, expected in {1: 4, 4: 4, 5: 16, 16: 16, 256: 256}.items():
        assert tuned.choose_cut(m, n, k, SHARE) == CUTS[expected]
    # The kernel for few tokens, asked for by name where the other one is faster.
    assert tuned.choose_streaming(4, n, k, SHARE) == CUTS[4]
    assert tuned.choose_streaming(5, n, k, SHARE) == rules.streaming_by_rule(5, n, k, SHARE)
    for m, expected in {5: CUTS[16], 16: CUTS[16], 225: CUTS[256], 256: CUTS[256]}.items():
        assert tuned.choose_tiling(m, n, k, 4 * SHARE) == expected
    for m in (17, 129, 224, 257, 9000):  # that are divided into tiles as nobody measured
        assert tuned.choose_tiling(m, n, k, 4 * SHARE) == rules.tiling_by_rule(m, n, k, 4 * SHARE)
    # So with the kernel for many tokens.
    assert tuned.choose_tiling(3, n, k, 4 * SHARE) == rules.tiling_by_rule(3, n, k, 4 * SHARE)


def test_rules_serve_what_nobody_measured(on_a_measured_device, monkeypatch):
    for n, k, share in ((6208, 4096, SHARE), (6144, 4224, SHARE), (6144, 4096, SHARE + 16)):
        assert tuned.choose_streaming(4, n, k, share) == rules.streaming_by_rule(4, n, k, share)
        assert tuned.choose_tiling(100, n, k, 4 * share) == rules.tiling_by_rule(100, n, k, 4 * share)
        assert tuned.choose_cut(7, n, k, share) == rules.cut_by_rule(7, n, k, share)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="NVIDIA H400")])
    assert tuned.choose_streaming(4, *WEIGHT) == rules.streaming_by_rule(4, *WEIGHT)


def lowers(m, n, k, cut):
    shape, settings = jax.ShapeDtypeStruct, {"n": n, "group_size": 128, "scale_dtype": E4M3}
    tiles = shape(weight_layout.tiles_shape(n, k, 128, E4M3), jnp.int32)
    kernel, how = (matvec, {"cut": cut}) if isinstance(cut, Streaming) else (matmul, {"tiling": cut})
    arguments = (shape((m, k), E4M3), shape((m,), jnp.float32), tiles, shape((), jnp.float32))
    traced = jax.jit(lambda *arrays: kernel(*arrays, **settings, **how)).trace(*arguments)
    return "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 4096, 14336), (8, 4096, 14336), (16, 6144, 4096), (50, 4096, 4096), (200, 6144, 4096)]
)
def test_candidates_begin_with_the_rules_and_lower(examples, m, n, k):
    from tuning_candidates import candidates

    found = candidates(m, n, k, SHARE)
    assert found[0] == rules.cut_by_rule(m, n, k, SHARE)
    assert len(set(found)) == len(found) > 3
    for cut in found:
        assert lowers(m, n, k, cut), cut
        if m == 1:
            assert tiling.rounds_its_input(cut, m, k, gated=True)


@pytest.mark.parametrize("how", rules.MANY_TOKENS, ids=str)
def test_tilings_of_the_rules_lower(how):
    assert how.shared_memory(4 * SHARE) <= tiling.SHARED_MEMORY
    assert lowers(300, 1088, 1664, how)


@pytest.mark.parametrize("name", ["tuning-h200", "cuts-of-other-shapes"])
def test_rules_choose_the_kernel_that_was_measured_to_be_faster(name):
    """Of eight tokens, that both kernels take; where they differ by more than runs do."""
    differ = 0
    for measured in json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())["products"]:
        n, k, m = measured["n"], measured["k"], measured["m"]
        if m == 8:
            best = {kernel: math.inf for kernel in tuned.KERNELS}
            for row in measured["tried"]:
                best[row["kernel"]] = min(best[row["kernel"]], row["microseconds"])
            faster, slower = sorted(best, key=best.__getitem__)
            if best[slower] > 1.04 * best[faster]:
                differ += 1
                assert tuned.kernel_of(rules.cut_by_rule(m, n, k, SHARE)) == faster, (n, k)
    assert differ > 3


def test_the_fastest_cut_must_be_clearly_faster(examples):
    from tuning_report import tuning_table

    def product(*microseconds):
        by_rule = rules.tiling_by_rule(100, 6144, 4096, 4 * SHARE)
        cuts = [Tiling(128, 3), by_rule, Tiling(128, 5)]
        rows = [tuned.as_class(WEIGHT, 100, cut) for cut in cuts[: len(microseconds)]]
        tried = [row | {"microseconds": us, "error": 1e-3} for row, us in zip(rows, microseconds, strict=True)]
        return {"n": 6144, "k": 4096, "m": 100, "tried": tried}

    results = dict.fromkeys(("command", "commit", "device", "versions"), "known")
    products = [product(9.9, 10.0, 12.0), product(9.7, 10.0, 9.1), product(9.9)]
    table = tuning_table({**results, "products": products}, "a file")
    found = [tuned.of_class(row)[2] for row in table["classes"]]
    assert found == [rules.tiling_by_rule(100, 6144, 4096, 4 * SHARE), Tiling(128, 5), Tiling(128, 3)]
    assert table["measured"] == {**results, "in": "a file"}


def test_landed_tables_fit_the_device_and_lower():
    for path in tuned.TABLES.glob("*.json"):
        content = json.loads(path.read_text())
        assert {"command", "commit", "device", "versions", "in"} <= content["measured"].keys()
        assert tuned.device_name(content["measured"]["device"]) == path.stem
        for (n, k, share), m, cut in map(tuned.of_class, content["classes"]):
            size = cut.shared_memory(m, n, k, share) if isinstance(cut, Streaming) else cut.shared_memory(4 * share)
            assert size <= tiling.SHARED_MEMORY
            assert lowers(m, n, k, cut), (path, n, k, m)
