"""Who may import whom: the rooms of the house keep their doors."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "trainer"
LEAVES = {"errors", "text", "written", "paths", "strict", "config", "stored", "progress"}
ALLOWED = {
    "errors": set(),
    "progress": set(),
    "text": {"errors"},
    "written": {"errors"},
    "paths": set(),
    "strict": {"errors", "text", "written"},
    "config": {"errors", "written", "paths", "strict"},
    "stored": {"config", "strict"},
    "data": LEAVES,
    "models": LEAVES,
    "run": LEAVES,
    "scoring": LEAVES | {"data", "models", "run"},
    "training": LEAVES | {"data", "models", "run", "scoring"},
    "evaluation": LEAVES | {"data", "models", "run", "scoring"},
    "cluster": LEAVES | {"data", "models", "run", "scoring", "training", "evaluation", "cli"},
}


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, dotted, without the leading `trainer.`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("trainer"):
            base = node.module.removeprefix("trainer").lstrip(".")
            for alias in node.names:
                dotted = f"{base}.{alias.name}".lstrip(".")
                is_module = (PACKAGE / (dotted.replace(".", "/") + ".py")).exists()
                found.add(dotted if is_module else base)
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("trainer.") for a in node.names if a.name.startswith("trainer.")}
    return found - {""}


def modules() -> dict[str, set[str]]:
    files = [p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"]
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts): imports(p) for p in files}


def test_rooms_import_only_what_they_may() -> None:
    for module, imported in modules().items():
        room = module.split(".")[0]
        if room in ALLOWED:
            strangers = {i for i in imported if i.split(".")[0] not in ALLOWED[room] | {room}}
            assert not strangers, f"{module} imports {strangers}"


def test_the_command_line_is_called_from_outside_and_by_the_tasks_of_jobs_alone() -> None:
    assert sorted(m for m, imported in modules().items() if "cli" in imported) == ["__main__", "cluster.task"]


def test_there_are_no_cycles() -> None:
    graph = modules()
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(graph) <= set(order)


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        path.relative_to(ROOT)
        for folder in (PACKAGE, ROOT / "tools")
        for path in folder.rglob("*.py")
        if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []
