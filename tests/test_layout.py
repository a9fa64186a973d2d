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
    if "modules" not in path.relative_to(ROOT / "labn").parts[:1]:
        assert not names & {"lightning", "pytorch_lightning"}


@pytest.mark.parametrize("folder", sorted(UPPER - {"cli"}))
def test_callbacks_and_data_modules_do_not_import_the_command_line(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert "cli" not in imported(path)


def test_nothing_calls_backward():
    files = [*LIBRARY, *(ROOT / "callbacks").rglob("*.py")]
    assert [str(path.relative_to(ROOT)) for path in files if "backward" in calls(path)] == []


def test_no_file_is_long():
    folders = ["labn", "callbacks", "datamodules", "tests"]
    files = [ROOT / "cli.py", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    assert [str(path.relative_to(ROOT)) for path in files if len(path.read_text().splitlines()) > 400] == []
