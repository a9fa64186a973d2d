"""The arrows between the packages go one way, and relevance is never propagated by filling `.grad`."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "labn").rglob("*.py"))
UPPER = {"callbacks", "datamodules", "cli"}


def imported(path):
    """Top-level names of the modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def calls(path):
    return {
        node.func.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_imports_nothing_above_it(path):
    names = imported(path)
    assert not names & UPPER
    if path.relative_to(ROOT / "labn").parts[0] not in ("modules", "commands"):
        assert not names & {"lightning", "pytorch_lightning"}


@pytest.mark.parametrize("folder", sorted(UPPER - {"cli"}))
def test_callbacks_and_data_modules_do_not_import_the_command_line(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert "cli" not in imported(path)


def test_no_module_calls_backward():
    files = [*LIBRARY, *(ROOT / "callbacks").rglob("*.py")]
    assert [str(path.relative_to(ROOT)) for path in files if "backward" in calls(path)] == []


# From the ground floor up: a room imports from the rooms before it.
ROOMS = [
    "labn.errors", "labn.io", "labn.inference", "labn.postprocess", "labn.perturbation", "labn.lrp", "labn.models",
    "labn.explainers", "labn.metrics", "labn.api", "labn", "labn.modules", "labn.results", "labn.compare",
    "labn.report", "labn.launch", "labn.commands", "datamodules", "callbacks", "cli",
]  # fmt: skip
FILES = [ROOT / "cli.py", *(p for top in ("labn", "callbacks", "datamodules") for p in (ROOT / top).rglob("*.py"))]
MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}


def arrows(name):
    """Modules of this project that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


GRAPH = {name: {other for other in arrows(name) if other in MODULES and other != name} for name in MODULES}


def room_of(name):
    return ".".join(name.split(".")[: 2 if name.startswith("labn.") else 1])


def test_every_folder_is_a_room():
    assert {room_of(name) for name in MODULES} == set(ROOMS)


@pytest.mark.parametrize("name", MODULES)
def test_a_room_imports_only_from_rooms_before_it(name):
    above = ROOMS[ROOMS.index(room_of(name)) + 1 :]
    assert [other for other in GRAPH[name] if room_of(other) in above] == []


def test_no_modules_import_each_other_in_a_circle():
    waiting = dict(GRAPH)
    while free := [name for name, others in waiting.items() if not others & waiting.keys()]:
        for name in free:
            del waiting[name]
    assert waiting == {}


@pytest.mark.parametrize("name", MODULES)
def test_nothing_of_the_project_is_imported_inside_a_function(name):
    functions = (node for node in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(node, ast.FunctionDef))
    inner = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.ImportFrom)]
    assert [node.module for node in inner if node.module in MODULES] == []


def test_the_root_of_the_library_holds_its_doors_only():
    assert {path.name for path in (ROOT / "labn").glob("*.py")} == {"__init__.py", "api.py", "errors.py"}
