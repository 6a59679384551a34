"""The house rules that a reader cannot be trusted to keep: floors, strangers, budgets, one registry."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import dfq
import dfq_kernels
from dfq_kernels.dispatch import TABLE

ROOT = Path(__file__).parent.parent
# rooms of dfq, lowest first; a module imports from its own room or from a floor below
FLOORS = [
    {"errors"},
    {"config", "running"},
    {"data", "models", "engine", "network"},
    {"layers"},
    {"quant"},
    {"export", "method"},
    {"arguments", "deploy", "student"},
    {"results"},
    {"api"},
    {"cli"},
    {"names"},
    {"__main__", "__init__"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
SOURCES = sorted(
    path for folder in ("dfq", "dfq_kernels", "tests", "benchmarks", "tools") for path in (ROOT / folder).rglob("*.py")
)


def imports(path: Path) -> set[str]:
    """Every absolute module name that the file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    part = path.relative_to(ROOT / "dfq").parts[0]
    return part.removesuffix(".py")


@pytest.mark.parametrize("path", sorted((ROOT / "dfq").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_go_down(path: Path) -> None:
    here = room(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "dfq" and len(parts) > 1 and parts[1] in FLOOR and parts[1] != here:
            assert FLOOR[parts[1]] < FLOOR[here], f"{path.name} is on floor {FLOOR[here]}, {name} is not below it"
        if parts[0] == "dfq" and len(parts) > 1 and parts[1] == "cli":
            assert here in ("cli", "__main__")


def test_every_room_has_its_floor() -> None:
    found = {path.stem if path.is_file() else path.name for path in (ROOT / "dfq").iterdir() if path.name[0] != "_"}
    assert found - {"assets"} == set(FLOOR) - {"__main__", "__init__"}


def test_only_a_layer_s_file_knows_its_kind() -> None:
    """The rest asks; it imports the file of no kind, but what a batch norm holds: the teacher has it, and the layer in
    front of it."""
    shared_by_kinds = {"__init__", "kind", "tail", "weighted", "integers"}
    kinds = {path.stem for path in (ROOT / "dfq/layers").glob("*.py")} - shared_by_kinds
    shared = {"batch_norm"}
    for path in sorted((ROOT / "dfq").rglob("*.py")):
        if path.parent.name != "layers":
            known = {name.split(".")[2] for name in imports(path) if name.startswith("dfq.layers.")}
            assert known & kinds <= shared, path


@pytest.mark.parametrize(
    "path", sorted((ROOT / "dfq_kernels").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_kernels_know_nothing_of_dfq(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    known = """dfq_kernels torch triton __future__ collections typing types functools importlib warnings re dataclasses
               math os pathlib contextlib itertools json struct"""
    assert roots <= set(known.split())


def test_backends_are_strangers() -> None:
    for op in TABLE:
        for backend in ("reference", "triton", "native"):
            path = ROOT / "dfq_kernels" / op / f"{backend}.py"
            if path.exists():
                others = {"reference", "triton", "native"} - {backend}
                assert not any(name.split(".")[-1] in others for name in imports(path) if "dfq_kernels" in name), path


def test_every_operator_has_its_folder_and_its_public_function() -> None:
    folders = {path.parent.name for path in (ROOT / "dfq_kernels").glob("*/api.py")}
    assert folders == set(TABLE)
    for op in TABLE:
        function = getattr(dfq_kernels, op)
        text = inspect.getdoc(function) or ""
        for section in ("Args:", "Returns:", "Raises:", "Source:"):
            assert section in text, f"{op}: {section} is missing from its docstring"
        for name in inspect.signature(function).parameters:
            assert name in text, f"{op}: {name} is missing from its docstring"
        for file in ("reference.py", "spec.py"):
            assert (ROOT / "dfq_kernels" / op / file).exists()


def test_public_functions_of_dfq_document_their_arguments() -> None:
    for name in dfq.__all__:
        function = getattr(dfq, name)
        text = inspect.getdoc(function) or ""
        assert text, name
        if inspect.isfunction(function):
            for argument in inspect.signature(function).parameters:
                assert argument in text, f"dfq.{name}: {argument} is missing from its docstring"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_budgets(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert path.stem not in ("utils", "helpers", "common", "misc")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body
            start = body[1].lineno if len(body) > 1 and ast.get_docstring(node) else body[0].lineno
            assert (node.end_lineno or 0) - start + 1 <= 60, f"{path.name}: {node.name} is over 60 lines"


@pytest.mark.parametrize("name", ["dfq", "dfq_kernels", "dfq/models", "dfq/quant"])
def test_no_logic_in_init(name: str) -> None:
    for node in ast.parse((ROOT / name / "__init__.py").read_text()).body:
        assert isinstance(node, (ast.ImportFrom, ast.Assign, ast.Expr)), ast.unparse(node)


def test_nothing_unpickles() -> None:
    for path in (ROOT / "dfq").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
                assert "weights_only=True" in ast.unparse(node), f"{path.name}: {ast.unparse(node)}"
