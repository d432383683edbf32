"""The tree keeps its shape: what may import what, how long files and functions get, which words stand nowhere."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "twn_kernels"

# What each part of the package may import of the rest of the package. errors and settings import nothing and are
# everyone's; a part may always import itself.
MAY_IMPORT = {
    "impl/reference": set(),
    "impl/blas": set(),
    "impl/triton": set(),
    "impl/cuda": set(),
    "ops": {"impl"},
    "modules": {"ops"},
    "checkpoint": set(),
    "patching": {"modules", "ops", "checkpoint"},
    "pipeline": {"patching", "modules", "ops", "checkpoint"},
    "training": {"evaluation", "testing", "pipeline", "patching", "modules", "ops", "checkpoint"},
    "evaluation": {"pipeline", "patching", "modules", "ops", "checkpoint"},
    "integrations": {"evaluation", "training", "pipeline", "patching", "modules", "ops", "checkpoint"},
    "env": {"ops", "impl"},
    "doctor": {"ops", "impl", "testing", "env"},
    "demo": {
        *("benchmarking", "evaluation", "shipped", "testing"),
        *("pipeline", "patching", "modules", "ops", "checkpoint"),
    },
    "shipped": set(),
    "cli": {
        *("benchmarking", "doctor", "demo", "env", "evaluation", "shipped", "training"),
        *("pipeline", "patching", "ops", "checkpoint"),
    },
    "testing": {"pipeline", "patching", "modules", "ops", "impl", "checkpoint"},
    "benchmarking": {"testing", "pipeline", "patching", "modules", "ops", "impl", "checkpoint", "env"},
}
EVERYONES = {"errors", "settings"}
HEAVY = {"PIL", "huggingface_hub", "matplotlib", "numpy", "peft"}
HEAVY |= {"pytrec_eval", "scipy", "sklearn", "torchvision", "tqdm", "transformers", "triton"}
# Packages that are only reached when what they hold is asked for, and may import their library at the top.
MAY_IMPORT_HEAVY = {"impl/triton", "training"}
TOP_LEVEL = {"csrc", "twn_kernels", "tests", "bench", ".ci", ".gitignore"}
TOP_LEVEL |= {"pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md", "Makefile"}
MAX_LINES, MAX_KERNEL_LINES, MAX_FUNCTION_LINES = 400, 600, 50


def _tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: the list of tracked files is unknown")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).exists()]


def _part(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    if relative.parts[0] == "impl" and len(relative.parts) > 2:
        return "/".join(relative.parts[:2])
    return relative.parts[0].removesuffix(".py")


def _modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)


def _imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = _top_level(tree) if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _top_level(tree: ast.Module):
    """Statements that run at import: not those of functions, nor of ``if TYPE_CHECKING``."""
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef) and "TYPE_CHECKING" not in ast.unparse(
            getattr(node, "test", ast.Constant(0))
        ):
            todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    part = _part(path)
    if part in EVERYONES or part in ("__init__", "__main__"):
        allowed = {"cli"} if part == "__main__" else set()
    else:
        known = part if part in MAY_IMPORT else part.split("/")[0]
        if known == "impl":
            allowed = set()
        else:
            allowed = MAY_IMPORT[known] | EVERYONES | {known.split("/")[0] if "/" not in known else known}
    top_level_only = part == "__init__"
    for name in _imports(path, top_level_only=top_level_only):
        if not name.startswith("twn_kernels."):
            continue
        target = name.removeprefix("twn_kernels.")
        if target == "__version__":
            continue
        fits = any(target == a or target.startswith((a + ".", a.replace("/", ".") + ".")) for a in allowed)
        fits = fits or any(target == a.replace("/", ".") for a in allowed)
        assert fits, f"{path.relative_to(ROOT)} ({part}) imports {name}; it may import {sorted(allowed)}"


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_optional_libraries_are_imported_where_they_are_used(path):
    if _part(path) in MAY_IMPORT_HEAVY or _part(path) == "testing":
        return
    found = {name.split(".")[0] for name in _imports(path, top_level_only=True)} & HEAVY
    assert not found, f"{path.relative_to(ROOT)} imports {sorted(found)} at import time"


def test_every_part_has_a_rule():
    parts = {_part(path) for path in _modules()} - {"__init__", "__main__", "impl"} - EVERYONES
    assert parts <= set(MAY_IMPORT), f"no import rule for {sorted(parts - set(MAY_IMPORT))}"


def test_files_stay_small():
    long = []
    for path in _tracked():
        if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h"):
            kernel = "impl/triton" in str(path) or "csrc" in path.parts
            lines = len(path.read_text().splitlines())
            if lines > (MAX_KERNEL_LINES if kernel else MAX_LINES):
                long.append(f"{path.relative_to(ROOT)}: {lines}")
    assert not long, long


def test_functions_stay_short():
    long = []
    for path in _modules():
        if _part(path) == "impl/triton":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = (body[-1].end_lineno - body[0].lineno + 1) if body else 0
                if length > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.name}: {length}")
    assert not long, long


def test_no_drawers():
    assert not [str(p) for p in _modules() if p.name in ("utils.py", "helpers.py", "common.py", "misc.py")]


def test_the_top_level_holds_only_what_the_design_names():
    tops = {path.relative_to(ROOT).parts[0] for path in _tracked()}
    assert tops <= TOP_LEVEL, sorted(tops - TOP_LEVEL)


def test_the_package_never_asserts():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in _modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert not found, found


def test_few_environment_variables():
    pattern = re.compile(r"\bTWN_[A-Z0-9_]*[A-Z0-9]\b")
    # What C++ names outside of a string is a macro; a variable that it read would be named in one.
    quoted = re.compile(r'"(TWN_[A-Z0-9_]*[A-Z0-9])"')
    names = set()
    for path in _tracked():
        if path.relative_to(ROOT).parts[0] == "csrc":
            names |= set(quoted.findall(path.read_text()))
        elif path.suffix in (".py", ".sh", ".toml") or path.name == "Makefile":
            names |= set() if "tests" in path.relative_to(ROOT).parts else set(pattern.findall(path.read_text()))
    assert len(names) <= 5, sorted(names)


def test_every_module_says_what_it_owns():
    silent = [str(p.relative_to(ROOT)) for p in _modules() if not ast.get_docstring(ast.parse(p.read_text()))]
    assert not silent, silent
