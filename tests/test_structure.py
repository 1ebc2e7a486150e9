"""Dependencies point one way: convert -> fireq_jax -> pallas_kernels -> jax. The command line is on top of all."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {"pallas_kernels": set(), "fireq_jax": {"pallas_kernels"}, "convert": {"fireq_jax"}}
TOP = {ROOT / "fireq_jax" / "cli.py", ROOT / "fireq_jax" / "demo.py"}


def imported(tree: ast.AST) -> set[str]:
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").split(".")[0])
    return roots


@pytest.mark.parametrize("package", ALLOWED)
def test_dependencies_point_one_way(package):
    files = set((ROOT / package).rglob("*.py"))
    assert files
    for path in files - TOP:
        assert imported(ast.parse(path.read_text())) & ALLOWED.keys() <= ALLOWED[package] | {package}, path


def test_torch_is_not_needed():
    """Only who asks for the benchmark's baseline in torch imports it, in a function that a process of its own calls."""
    baseline = ROOT / "fireq_jax" / "torch_benchmark.py"
    for package in ALLOWED:
        for path in set((ROOT / package).rglob("*.py")) - {baseline}:
            assert "torch" not in imported(ast.parse(path.read_text())), path
    module = ast.parse(baseline.read_text())
    assert "torch" in imported(module)
    assert "torch" not in imported(
        ast.Module([n for n in module.body if not isinstance(n, ast.FunctionDef)], [])
    )  # fmt: skip
