"""Who may import whom: launch -> training -> models, data -> parallel -> kernels, never back."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RANKS = {
    "fla_dist.kernels": 0,
    "fla_dist.parallel": 1,
    "fla_dist.models": 2,
    "fla_dist.data": 2,
    "fla_dist.training": 3,
    "fla_dist.benchmark": 4,
    "launch": 5,
}
NEEDS_ONLY_TORCH = {"fla_dist.kernels": {"torch", "triton", "fla_dist"}}


def package_of(module: str) -> str | None:
    return next((name for name in RANKS if module == name or module.startswith(name + ".")), None)


def sources() -> Iterator[tuple[str, Path]]:
    for package in RANKS:
        folder = package.replace("fla_dist.kernels", "kernels").replace(".", "/")
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield package, path


def imported(path: Path) -> Iterator[str]:
    """Modules that the file imports anywhere, but for those that only type checkers see."""
    tree = ast.parse(path.read_text())
    hidden: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            hidden.update(descendant for child in node.body for descendant in ast.walk(child))
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("package", "path"), sources(), ids=lambda x: str(x).split("/")[-1])
def test_imports_point_down(package: str, path: Path) -> None:
    for module in imported(path):
        target = package_of(module)
        if target is None or target == package:
            continue
        assert RANKS[target] < RANKS[package], f"{path} imports {module}"


def test_kernels_need_only_torch_and_triton() -> None:
    import sys

    for package, path in sources():
        if package in NEEDS_ONLY_TORCH:
            for module in imported(path):
                top = module.split(".")[0]
                known = top in NEEDS_ONLY_TORCH[package] or top in sys.stdlib_module_names
                assert known or top == "__future__", f"{path} imports {module}"
