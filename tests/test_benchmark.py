"""``fireq-jax bench`` and the page that is made of what it writes."""

import contextlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_cli import run

from fireq_jax import benchmark, kernel_profile, timed_calls, torch_benchmark
from fireq_jax.kv_cache import cache_bytes_per_token
from fireq_jax.quantize import parameter_bytes

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def report():
    sys.path.insert(0, str(ROOT / "examples"))
    import benchmark_report

    sys.path.pop(0)
    return benchmark_report


def test_smoke(monkeypatch, capsys, tmp_path, report):
    code, out, _ = run(monkeypatch, capsys, "bench", "--smoke", "--commit", "abc", "--json", tmp_path / "toy.json")
    assert code == 0
    result = json.loads((tmp_path / "toy.json").read_text())
    assert (result["sizes"], result["commit"], result["config"]["hidden_size"]) == ("toy", "abc", 128)
    assert [case["tokens"] for case in result["feed_forward"]] == [1, 8]
    assert [(case["batch"], case["length"]) for case in result["prefill"]] == [(1, 32), (2, 16)]
    assert [(case["batch"], case["context"], case["new_tokens"]) for case in result["decode"]] == [
        (1, 16, 32), (2, 16, 32),
    ]  # fmt: skip
    times = [case["microseconds"] for case in result["feed_forward"]]
    assert [(case["batch"], case["length"], case["new_tokens"]) for case in result["generate"]] == [(2, 16, 32)]
    times += [case["milliseconds"] for case in (*result["prefill"], *result["decode"], *result["generate"])]
    assert all(set(pair) == {"int4", "bf16"} and min(pair.values()) > 0 for pair in times)
    assert 0 < result["distances_from_bf16"]["reference"] < 1
    assert result["copy_bytes_per_second"] > 1e8
    # Two layers of q, k, v, o, gate, up and down, the embedding and the head, in bf16, and five norms.
    floats = 2 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256) + 2 * 256 * 128 + 5 * 128
    assert result["parameter_bytes"]["bf16"] == 2 * floats
    for case in result["generate"]:
        assert case["memory_bytes"]["bf16"] > 2 * floats
    for case in result["decode"]:
        cache = case["batch"] * (16 + 32 / 2) * cache_bytes_per_token(benchmark.SIZES["toy"], "float")
        assert case["bytes"]["bf16"] == 2 * (floats - 256 * 128) + cache
        # The loop's caches, or those it is given, are there beside the weights.
        assert case["memory_bytes"]["bf16"] > 2 * floats
        assert min(case["compile_seconds"].values()) > 0
    assert "decode, 2 x 16, per token" in out
    assert "generate, 2 x 16 and 32 more" in out
    # Thirty-two tokens of two sequences.
    rate = 1e3 * 2 * 32 / result["generate"][0]["milliseconds"]["int4"]
    assert f"| 2 x 16 + 32 | {result['generate'][0]['milliseconds']['int4']:.1f} |" in report.page(result)
    assert f"| {rate:.0f} |" in report.page(result)
    assert f"{result['prefill'][0]['milliseconds']['int4']:.1f}" in report.page(result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sizes", "llama-9"), "unknown sizes 'llama-9'"),
        (("--prefill", "16"), "--prefill '16': positive numbers like 16x1024"),
        (("--decode", "0x5"), "--decode '0x5'"),
        (("--feed-forward", "many"), "--feed-forward 'many'"),
        (("--sizes", "toy", "--prefill", "1x2000"), "1 x 2000 tokens: there are 1024 positions"),
        (
            ("--sizes", "toy", "--prefill", "1x8", "--decode", "1x8", "--generate", "1x1000"),
            "1 x 1064 tokens: there are 1024 positions",
        ),
        (("--operators", "some"), "--operators 'some' must be first, all or none"),
    ],
)
def test_refuses_what_it_cannot_measure(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(benchmark, "random_params", lambda *_: pytest.fail("began to work"))
    code, _, err = run(monkeypatch, capsys, "bench", *arguments)
    assert code == 2
    assert message in " ".join(err.split())


def test_wrong_kernels_are_not_timed(monkeypatch):
    """The check sees a kernel that computes something else."""
    import pallas_kernels

    right = pallas_kernels.decode_attention

    def wrong(*arrays, implementation=None, **options):
        out = right(*arrays, implementation=implementation, **options)
        return out if implementation else -10 * out

    monkeypatch.setattr(pallas_kernels, "decode_attention", wrong)
    monkeypatch.setattr(benchmark, "prefill_call", lambda *_: pytest.fail("was timed"))
    jax.clear_caches()
    with pytest.raises(RuntimeError, match="the kernels' logits are"):
        benchmark.run_benchmark("toy", prefill=[(1, 8)])
    jax.clear_caches()


def test_out_of_memory_is_a_result():
    def too_much():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    def broken():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    assert timed_calls.unless_too_large(too_much) is None
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        timed_calls.unless_too_large(broken)


def test_torch_is_measured_in_a_process_of_its_own(monkeypatch, capsys):
    if importlib.util.find_spec("torch") is None:
        code, _, err = run(monkeypatch, capsys, "bench", "--smoke", "--torch")
        assert code == 2
        assert "torch is not installed" in err
    answer = {"versions": {}, "prefill": [3.5], "decode": [{"default": 2.0, "static cache": None}]}
    asked = []

    def process(command, input, **_):
        asked.append(json.loads(input))
        return SimpleNamespace(returncode=0, stdout="a warning\n" + json.dumps(answer), stderr="")

    monkeypatch.setattr(torch_benchmark, "find_spec", lambda _: True)
    monkeypatch.setattr(torch_benchmark.subprocess, "run", process)
    config = benchmark._transformers_config(benchmark.SIZES["llama-3-8b"])
    assert torch_benchmark.run(config, [(1, 8)], [(2, 16)], 4) == answer
    assert asked[0]["config"]["num_key_value_heads"] == 8
    assert asked[0]["decode"] == [[2, 16]]
    monkeypatch.setattr(
        torch_benchmark.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="it broke")
    )
    with pytest.raises(RuntimeError, match="it broke"):
        torch_benchmark.run(config, [], [], 4)


@pytest.mark.parametrize(
    ("kernel", "operator"),
    [
        ("int4_matvec_mosaic_gpu_kernel", "matmul"),
        ("nvjet_sm90_tst_176x128_64x5_1x2_h_bz_TNN", "matmul"),
        ("gemm_fusion_dot_1", "matmul"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_", "attention"),
        ("norm_quantize_mosaic_gpu_kernel", "norms and roundings"),
        ("rotate_and_round_mosaic_gpu_kernel", "rotation and cache"),
        ("loop_add_fusion_29", "other"),
    ],
)
def test_kernels_belong_to_operations(kernel, operator):
    assert kernel_profile.operator_of(kernel) == operator


def test_times_of_kernels_are_those_of_one_part(monkeypatch):
    def event(name, microseconds):
        return SimpleNamespace(name=name, duration_ns=1e3 * microseconds)

    stream = SimpleNamespace(name="Stream #1", events=[event("int4_matvec", 4), event("copy", 6)] * 2)
    host = SimpleNamespace(name="Framework ops", events=[event("int4_matvec", 99)])
    planes = [
        SimpleNamespace(name="/device:GPU:0", lines=[stream, host]), SimpleNamespace(name="/host:CPU", lines=[stream])
    ]  # fmt: skip

    @contextlib.contextmanager
    def trace(folder):
        yield
        Path(folder, "a.xplane.pb").touch()

    monkeypatch.setattr(jax.profiler, "trace", trace)
    monkeypatch.setattr(jax.profiler.ProfileData, "from_file", lambda _: SimpleNamespace(planes=planes))
    times = kernel_profile.kernel_times(lambda: None, parts=4)
    assert times["kernels"] == {
        "int4_matvec": {"count": 0.5, "microseconds": 2.0}, "copy": {"count": 0.5, "microseconds": 3.0}
    }  # fmt: skip
    assert {name: time for name, time in times["microseconds"].items() if time} == {"matmul": 2.0, "other": 3.0}


def test_kernels_of_all_cases_are_profiled(monkeypatch):
    parts = []
    monkeypatch.setattr(benchmark, "kernel_times", lambda call, count: parts.append((call() is None, count)) or {})
    cases = {"prefill": [(1, 8), (2, 8)], "decode": [(1, 8), (2, 8)]}
    result = benchmark.run_benchmark("toy", recipe="rtn", **cases, new_tokens=4, operators="all")
    assert list(result["operators"]) == ["prefill 1 x 8", "prefill 2 x 8", "decode 1 x 8", "decode 2 x 8"]
    assert parts == [(False, 1)] * 4 + [(False, 4)] * 4  # steps of a loop, of both kinds of model


def test_random_weights_have_the_sizes_of_the_model():
    params = timed_calls.random_params(benchmark.SIZES["toy"])
    assert parameter_bytes(params) == 722176
    kernel = np.asarray(params["layers_0"]["mlp"]["gate"]["kernel"], np.float32)
    assert 0.019 < kernel.std() < 0.021


def test_the_page_holds_the_stored_results(report):
    found = report.stored()
    results = found["llama-3-8b"]
    page, readme = (ROOT / "docs" / "benchmarks.md").read_text("utf-8"), (ROOT / "README.md").read_text("utf-8")
    assert report.page(results) in page
    assert report.readme_table(found) in readme
    # 16 x 1024 tokens, and the paper's number beside ours.
    first = results["prefill"][0]["milliseconds"]
    section = page.partition("## llama-3-8b\n")[2].partition("\n## ")[0]
    [row] = [line for line in section.splitlines() if line.startswith("| 16 x 1024 | ") and "37.2" in line]
    assert f"{16 * 1024 / first['int4']:.1f} | {16 * 1024 / first['bf16']:.1f} |" in row
    lost = json.loads(json.dumps(results))
    lost["prefill"][0]["milliseconds"]["bf16"] = None
    assert "out of memory | - |" in report.prefill_table(lost)
