"""Turns what ``fireq-jax bench --json`` wrote into the tables of docs/benchmarks.md and README.md and the plot.

uv run --group plots python examples/benchmark_report.py
"""

import json
from pathlib import Path
from typing import Any

from pages import RESULTS, fill, pyplot, table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
PLOT = ROOT / "docs" / "benchmarks.svg"
CONTEXTS_PLOT = ROOT / "docs" / "long-contexts.svg"
README = ROOT / "README.md"
IN_README = ("llama-3-8b", "llama-3-8b-h200")  # of one model, on a device each
# Prefill of Llama-3-8B in 1000 tokens per second, as the paper has them (arXiv 2505.20839), on an H100, batch 16.
PAPER = {
    "FireQ": {1024: 37.2, 2048: 34.5, 4096: 32.9},
    "TensorRT-LLM FP16": {1024: 28.8, 2048: 13.6, 4096: 13.8},
    "QServe": {1024: 29.4, 2048: 29.4, 4096: 28.5},
}


# Dense e4m3 products of an H100 or H200 (SXM), by its data sheet.
PEAK_FLOPS = 1979e12


def projections(config: dict[str, Any]) -> dict[str, int]:
    """Weights of a layer's attention and of its feed-forward block."""
    hidden, heads, kv_heads = config["hidden_size"], config["num_heads"], config["num_kv_heads"]
    return {
        "attention": hidden * config["head_dim"] * 2 * (heads + kv_heads),
        "feed-forward": 3 * hidden * config["intermediate_size"],
    }


def prefill_flops(config: dict[str, Any], batch: int, length: int) -> float:
    """Products of all projections, half of each square of scores, and the logits behind each prompt."""
    of_layer = 2 * sum(projections(config).values()) * length
    of_layer += 2 * config["num_heads"] * config["head_dim"] * length**2
    return float(batch * (config["num_layers"] * of_layer + 2 * config["hidden_size"] * config["vocab_size"]))


def of_roofline(results: dict[str, Any], seconds: float | None, flops: float, read: float) -> str:
    """The share that the tensor cores or, if that is more, ``read`` bytes at copy bandwidth would need of a time."""
    if seconds is None or not results["device"].startswith(("NVIDIA H100", "NVIDIA H200")):
        return "-"
    return f"{max(flops / PEAK_FLOPS, read / results['copy_bytes_per_second']) / seconds:.0%}"


def speed(times: dict[str, float | None]) -> str:
    return f"{times['bf16'] / times['int4']:.2f}x" if times["bf16"] and times["int4"] else "-"


def shown(value: float | None, digits: int = 2) -> str:
    return "out of memory" if value is None else f"{value:.{digits}f}"


def feed_forward_table(results: dict[str, Any]) -> str:
    rows = []
    for case in results["feed_forward"]:
        times = case["microseconds"]
        cells = [str(case["tokens"]), shown(times["int4"], 1), shown(times["bf16"], 1), speed(times)]
        weights = projections(results["config"])["feed-forward"]
        # Codes, and a scale for each 128.
        share = of_roofline(
            results, times["int4"] and times["int4"] / 1e6, 2 * weights * case["tokens"], weights * (1 / 2 + 1 / 128)
        )
        rows.append([*cells, share, shown(times["fp8"], 1) if "fp8" in times else "-"])
    return table(["tokens", "INT4/FP8, us", "bf16, us", "speed", "of roofline", "fp8 by XLA, us"], rows)


def gigabytes(case: dict[str, Any], kind: str) -> str:
    return f"{case['memory_bytes'][kind] / 1e9:.1f}" if "memory_bytes" in case else "-"


def of_torch(results: dict[str, Any], part: str, index: int) -> list[str]:
    """What transformers took, if it was measured: of a prompt, or of a token by both caches."""
    if not results.get("torch"):
        return ["-"] if part == "prefill" else ["-", "-"]
    found = results["torch"][part][index]
    return [shown(found, 1)] if part == "prefill" else [shown(value, 2) for value in found.values()]


def prefill_table(results: dict[str, Any]) -> str:
    rows = []
    for index, case in enumerate(results["prefill"]):
        times = case["milliseconds"]
        batch, length = case["batch"], case["length"]
        rates = [None if times[kind] is None else batch * length / times[kind] for kind in ("int4", "bf16")]
        paper = [
            f"{of_length[length]:.1f}"
            if batch == 16 and length in of_length and results["sizes"] == "llama-3-8b"
            else "-"
            for of_length in PAPER.values()
        ]
        cells = [f"{batch} x {length}", shown(times["int4"], 1), shown(times["bf16"], 1), speed(times)]
        flops = prefill_flops(results["config"], batch, length)
        seconds = times["int4"] and times["int4"] / 1e3
        cells += [shown(seconds and flops / seconds / 1e12, 0), of_roofline(results, seconds, flops, 0)]
        memory = [gigabytes(case, kind) for kind in ("int4", "bf16")]
        rows.append(
            [*cells, *(shown(rate, 1) for rate in rates), *memory, *of_torch(results, "prefill", index), *paper]
        )
    header = ["batch x tokens", "INT4/FP8, ms", "bf16, ms", "speed", "TFLOP/s", "of e4m3 peak"]
    header += ["INT4/FP8, k tokens/s", "bf16, k tokens/s", "INT4/FP8, GB", "bf16, GB", "transformers bf16, ms"]
    return table([*header, *(f"{name} in the paper" for name in PAPER)], rows)


def decode_table(results: dict[str, Any]) -> str:
    rows = []
    for index, case in enumerate(results["decode"]):
        times = case["milliseconds"]
        rate = None if times["int4"] is None else case["bytes"]["int4"] / times["int4"] / 1e9
        cells = [f"{case['batch']} x {case['context']}", shown(times["int4"], 3), shown(times["bf16"], 3), speed(times)]
        share = None if rate is None else rate * 1e12 / results["copy_bytes_per_second"]
        memory = [gigabytes(case, kind) for kind in ("int4", "bf16")]
        cells += [shown(rate), f"{case['bytes']['int4'] / 1e9:.2f}", "-" if share is None else f"{share:.0%}", *memory]
        rows.append([*cells, *of_torch(results, "decode", index)])
    header = ["batch x context", "INT4/FP8, ms per token", "bf16, ms per token", "speed", "TB/s", "of GB per step"]
    header += ["of copy bandwidth", "INT4/FP8, GB", "bf16, GB", "transformers bf16, ms", "with a static cache, ms"]
    return table(header, rows)


def operators_table(results: dict[str, Any]) -> str:
    names, rows, operators = {"int4": "INT4/FP8", "bf16": "bf16"}, [], []
    for case, kinds in results["operators"].items():
        for kind, name in names.items():
            if kinds.get(kind):
                of_kernels = kinds[kind]["microseconds"]
                operators, total = list(of_kernels), sum(of_kernels.values())
                shares = [f"{us / 1e3:.2f} ({us / total:.0%})" for us in of_kernels.values()]
                rows.append([case, name, *shares, f"{total / 1e3:.2f}"])
    return table(["ms", "", *operators, "all"], rows)


def generate_table(results: dict[str, Any]) -> str:
    rows = []
    for case in results["generate"]:
        times, tokens = case["milliseconds"], case["batch"] * case["new_tokens"]
        rates = [None if times[kind] is None else 1e3 * tokens / times[kind] for kind in ("int4", "bf16")]
        cells = [f"{case['batch']} x {case['length']} + {case['new_tokens']}", shown(times["int4"], 1)]
        cells += [shown(times["bf16"], 1), speed(times), *(shown(rate, 0) for rate in rates)]
        rows.append([*cells, *(gigabytes(case, kind) for kind in ("int4", "bf16"))])
    header = ["batch x prompt + new tokens", "INT4/FP8, ms", "bf16, ms", "speed", "INT4/FP8, new tokens/s"]
    return table([*header, "bf16, new tokens/s", "INT4/FP8, GB", "bf16, GB"], rows)


def decode_part(results: dict[str, Any]) -> list[str]:
    about = (
        "A loop on the device, greedy choice included. Bytes are those of all weights but the input embedding, and of "
        "the caches."
    )
    return ["### Decoding", about, decode_table(results)]


def generate_part(results: dict[str, Any]) -> list[str]:
    about = "One call of `generate`: the prompts, the loop, and draws with a temperature of 0.8 and top-p of 0.95."
    return ["### Generating", about, generate_table(results)]


def feed_forward_part(results: dict[str, Any]) -> list[str]:
    about = "Norm, gate and up, SiLU, down, residual sum and all roundings."
    return ["### Feed-forward block", about, feed_forward_table(results)]


def operators_part(results: dict[str, Any]) -> list[str]:
    about = "Sums of the kernels' own times, from one profiled call; "
    if results.get("decode_profile") == "loop":
        about += "a decode step's are the mean of those of the loop above, whose first step copies the cache."
    else:
        about += "the decode step's cache is not donated here, so that its copies count as other."
    return ["### Where the time goes", about, operators_table(results)]


# How the output projection is kept; earlier results say only whether it is quantised.
HEADS = {
    False: "", "float": "", True: " with an INT4 output projection", "int4": " with an INT4 output projection",
    "fp8": " with an output projection in e4m3", "int8": " with an INT8 output projection",
}  # fmt: skip


def page(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    far = results["distances_from_bf16"]
    parts = [
        f"{results['sizes']}, random weights, recipe `{results['recipe']}`"
        f"{HEADS[results.get('lm_head', False)]}, {results['device']}; {versions}; "
        f"commit {results['commit']}: `{results['command']}`.",
        "Before anything is timed, logits of two layers are compared with the bf16 model's: the kernels are "
        f"{far['kernels']:.4f} away (relative Frobenius norm), the reference implementation of the same roundings "
        f"{far['reference']:.4f}. Weights without structure lose much in 4 bits; the numbers must agree.",
        *(["### Prefill", prefill_table(results)] if results["prefill"] else []),
        *(decode_part(results) if results["decode"] else []),
        *(generate_part(results) if results.get("generate") else []),
        *(feed_forward_part(results) if results["feed_forward"] else []),
        *(operators_part(results) if any(any(kinds.values()) for kinds in results["operators"].values()) else []),
    ]
    return "\n\n".join(parts)


def readme_rows(results: dict[str, Any]) -> dict[str, list[str]]:
    """Times and speeds of each case."""
    rows = {
        f"prefill, {c['batch']} x {c['length']} tokens": [
            f"{shown(c['milliseconds']['int4'], 1)} ms",
            speed(c["milliseconds"]),
        ]
        for c in results["prefill"]
    }
    return rows | {
        f"decoding at {c['context']} tokens, batch {c['batch']}": [
            f"{shown(c['milliseconds']['int4'])} ms per token", speed(c["milliseconds"])
        ]
        for c in results["decode"]
    }  # fmt: skip


def readme_table(found: dict[str, dict[str, Any]]) -> str:
    """The same cases on several devices, side by side."""
    of_devices = [found[name] for name in IN_README if name in found]
    parts = [readme_rows(results) for results in of_devices]
    header = [of_devices[0]["sizes"]]
    for results in of_devices:
        header += [results["device"], "speed to bf16"]
    cases = dict.fromkeys(case for rows in parts for case in rows)
    return table(header, [[case, *(cell for rows in parts for cell in rows.get(case, ["-", "-"]))] for case in cases])


def draw_plot(results: dict[str, Any]) -> None:
    """Ratios of all cases, and the kernels' times by operation."""
    plt = pyplot()
    ratios = {f"block, {c['tokens']}": c["microseconds"] for c in results["feed_forward"]}
    ratios |= {f"prefill, {c['batch']} x {c['length']}": c["milliseconds"] for c in results["prefill"]}
    ratios |= {f"decode, {c['batch']} x {c['context']}": c["milliseconds"] for c in results["decode"]}
    ratios = {name: times for name, times in ratios.items() if times["int4"] and times["bf16"]}
    profiled = {case: kinds for case, kinds in results["operators"].items() if all(kinds.values())}
    figure, axes = plt.subplots(
        1, 1 + len(profiled), figsize=(5 + 3 * len(profiled), 4), layout="constrained", squeeze=False
    )
    first, *others = axes[0]
    first.barh(list(ratios), [times["bf16"] / times["int4"] for times in ratios.values()])
    first.axvline(1, color="black", linewidth=0.8)
    first.invert_yaxis()
    first.set_xlabel("speed to bf16")
    for axis, (case, kinds) in zip(others, profiled.items(), strict=True):
        bottoms = dict.fromkeys(kinds, 0.0)
        for operator in kinds["int4"]["microseconds"]:
            heights = {kind: kinds[kind]["microseconds"][operator] / 1e3 for kind in kinds}
            axis.bar(list(kinds), list(heights.values()), bottom=list(bottoms.values()), label=operator)
            bottoms = {kind: bottoms[kind] + heights[kind] for kind in kinds}
        axis.set_title(case)
        axis.set_ylabel("ms")
    if others:
        others[0].legend(fontsize="small")
    figure.savefig(PLOT, metadata={"Date": None})


def draw_long_contexts(results: dict[str, Any]) -> None:
    """What prompts and their continuations take of the device's memory, and how long, over their length."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    names = {"int4": "INT4/FP8", "bf16": "bf16"}
    for kind, name in names.items():
        for part, what, style in (("prefill", "length", "-"), ("decode", "context", "--")):
            cases = [case for case in results[part] if case["batch"] == 1]
            lengths = [case[what] for case in cases]
            memory = [case["memory_bytes"][kind] / 1e9 for case in cases]
            axes[0, 0].plot(lengths, memory, style, marker=".", label=f"{name}, {part}")
            times = [(n, case["milliseconds"][kind]) for n, case in zip(lengths, cases, strict=True)]
            times = [(n, ms) for n, ms in times if ms is not None]
            axis = axes[0, 1 if part == "prefill" else 2]
            axis.plot(*zip(*times, strict=True), marker=".", label=name)
    axes[0, 0].axhline(80, color="black", linewidth=0.8)
    parts = [("prefill", "int4"), ("decode", "int4"), ("decode", "bf16")]
    for axis, (part, kind) in zip(axes[1], parts, strict=True):
        profiles = {
            int(case.rpartition("x")[2]): kinds[kind]["microseconds"]
            for case, kinds in results["operators"].items()
            if case.startswith(f"{part} 1 x ") and kinds.get(kind)
        }
        shares = [[us / sum(of.values()) for us in of.values()] for of in profiles.values()]
        axis.stackplot(list(profiles), *zip(*shares, strict=True), labels=list(next(iter(profiles.values()))))
    labels = ["GB", "prefill, ms", "decoding, ms per token"]
    labels += [f"share of kernels' time, {part}, {names[kind]}" for part, kind in parts]
    for axis, label in zip(axes.flat, labels, strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens")
        axis.set_ylabel(label)
        axis.legend(fontsize="small")
    axes[0, 1].set_yscale("log")
    figure.savefig(CONTEXTS_PLOT, metadata={"Date": None})


def stored() -> dict[str, dict[str, Any]]:
    """All results, by the name of their file behind ``bench-``."""
    return {
        path.stem.removeprefix("bench-"): json.loads(path.read_text("utf-8"))
        for path in sorted(RESULTS.glob("bench-*.json"))
    }


def main() -> None:
    found = stored()
    fill(PAGE, "benchmarks", "\n\n".join(f"## {name}\n\n{page(results)}" for name, results in found.items()))
    fill(README, "benchmarks", readme_table(found))
    draw_plot(found["llama-3-8b"])
    if "llama-3-8b-long" in found:
        draw_long_contexts(found["llama-3-8b-long"])


if __name__ == "__main__":
    main()
