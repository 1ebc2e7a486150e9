"""What a benchmark found, as a table for a terminal."""

from typing import Any

from rich.table import Table


def benchmark_table(result: dict[str, Any]) -> Table:
    """One row per case that :func:`fireq_jax.benchmark.run_benchmark` timed, of what it returned."""
    table = Table(title=f"{result['sizes']}, {result['recipe']}, on {result['device']}; bf16 through the same code")
    for column in ("", "INT4/FP8", "bf16", "speed"):
        table.add_column(column, justify="left" if not column else "right")
    for case in result["feed_forward"]:
        _add_times(table, f"feed-forward block, {case['tokens']} tokens", case["microseconds"], "us")
    for case in result["prefill"]:
        _add_times(table, f"prefill, {case['batch']} x {case['length']}", case["milliseconds"], "ms")
    for case in result["decode"]:
        _add_times(table, f"decode, {case['batch']} x {case['context']}, per token", case["milliseconds"], "ms")
    for case in result["generate"]:
        what = f"generate, {case['batch']} x {case['length']} and {case['new_tokens']} more"
        _add_times(table, what, case["milliseconds"], "ms")
    return table


def _add_times(table: Table, name: str, times: dict[str, float | None], unit: str) -> None:
    ours, theirs = times["int4"], times["bf16"]
    cells = ["out of memory" if t is None else f"{t:.3f} {unit}" for t in (ours, theirs)]
    table.add_row(name, *cells, f"{theirs / ours:.2f}x" if ours and theirs else "-")
