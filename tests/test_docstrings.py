"""The examples in docstrings run, and every public function and class of the doors has one."""

import doctest
import importlib
import inspect
import os
import pkgutil

import pytest

import callbacks
import datamodules
import labn
import labn.api
import labn.explainers
import labn.metrics
import labn.metrics.functional

PACKAGES = (labn, callbacks, datamodules)
DOORS = (labn.api, labn.explainers, labn.metrics, labn.metrics.functional, datamodules)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def modules():
    for package in PACKAGES:
        yield package.__name__
        yield from (found.name for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))


def with_examples():
    for name in modules():
        module = importlib.import_module(name)
        for found in doctest.DocTestFinder(exclude_empty=True).find(module):
            if found.examples:
                yield found


EXAMPLES = sorted(with_examples(), key=lambda found: found.name)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_the_example_of_a_docstring_gives_what_it_prints(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = []
    result = doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(example, out=said.append)
    assert result.failed == 0, "".join(said)
    assert os.listdir(tmp_path) == []


def public(module):
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    for name in names:
        thing = getattr(module, name)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            where = getattr(thing, "__module__", "").split(".")[0]
            if where in {"labn", "datamodules"} and (module is not labn.api or thing.__module__ == "labn.api"):
                yield f"{module.__name__}.{name}", thing


PUBLIC = dict(pair for module in DOORS for pair in public(module))


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_function_or_class_has_an_example(name):
    assert ">>>" in (inspect.getdoc(PUBLIC[name]) or "")
