"""What identifies an explainer in results."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from callbacks.explanation.session import check_classes_known
from labn.explainers import C3LRP, CRP, LRP, AttentionMapGuided, GradCAM, Negated, explainer_by_name
from labn.inference.fingerprint import digest
from labn.metrics import PatchInsertionDeletion
from labn.results.fingerprints import describe, source_digest


class Own:
    """An explainer's arguments, of whatever kind its author likes."""

    def __init__(self, thing):
        self.thing = thing


class Slotted:
    __slots__ = ("x",)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Path("a"), Path("b")),
        (np.array([1.0, 2.0]), np.array([1.0, 3.0])),
        (torch.float32, torch.float64),
        ({1, 2}, {1, 3}),
        (np.float32(1), np.float32(2)),
        (torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])),
        (torch.ones(2, 3), torch.ones(3, 2)),
        (torch.ones(2), torch.ones(2, dtype=torch.bfloat16)),
        (torch.tensor(True), torch.tensor(False)),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_different_arguments_have_different_descriptions(one, other):
    assert digest(describe(Own(one))) == digest(describe(Own(one)))
    assert digest(describe(Own(one))) != digest(describe(Own(other)))


def test_the_description_of_a_tensor_does_not_depend_on_threads():
    thing, threads = torch.rand(3, 512, 512, generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 4, 8):
            torch.set_num_threads(count)
            found.append(describe(thing))
    finally:
        torch.set_num_threads(threads)
    assert found == found[:1] * 4
    assert describe(thing.transpose(1, 2).contiguous().transpose(1, 2)) == found[0]


def test_descriptions_hold_no_memory_address():
    assert describe(Own(Slotted())) == describe(Own(Slotted()))


KNOWN = {"labn": "fafc52221106", "-labn": "078c4f1927af", "gradcam": "32a9922224f5", "rise": "f88d3618bce9"}
KNOWN |= {"lrp": "957ca539fd83", "c3lrp": "4ba119825bd2", "random": "61d47cca3327", "constant": "59d4bd1fcb6a"}


def test_keys_of_saved_maps_do_not_change_when_modules_move():
    assert {name: digest(describe(explainer_by_name(name)), "label") for name in KNOWN} == KNOWN
    assert digest(describe(LRP(postprocess=["c3", "hq8"])), "label") == "c1ac55ff38cf"
    assert [source_digest(kind) for kind in (GradCAM, C3LRP, PatchInsertionDeletion, int)] == [None] * 4


def test_a_new_revision_gives_other_keys(monkeypatch):
    changed = [
        LRP(first_layer="zbox"),
        CRP(first_layer="zbox", batchnorm="pass"),
        AttentionMapGuided(attention="cbam"),
        PatchInsertionDeletion(4, area="mean"),
    ]
    same = [LRP(), CRP(batchnorm="pass"), AttentionMapGuided(), AttentionMapGuided(attention="cbam", normalise=False)]
    same += [PatchInsertionDeletion(4), PatchInsertionDeletion(4, area="mean", ties="stable")]
    assert [thing.revision for thing in changed] == [1] * 4
    assert [thing.revision for thing in same] == [0] * 6
    assert [thing.revision for thing in (LRP(batchnorm="fold"), CRP(), CRP(first_layer="zbox"))] == [2, 2, 3]
    before = describe(Negated(changed[0]))
    monkeypatch.setattr(LRP, "revision", 2)
    assert describe(Negated(changed[0])) != before


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A function that writes the module of a method and of what it builds on, and gives the method's class."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(sign, factor=1):
        (tmp_path / "my_base.py").write_text(f"class Base:\n    FACTOR = {factor}\n")
        (tmp_path / "my_own_method.py").write_text(
            "from labn.explainers import Explainer\nfrom my_base import Base\n"
            f"SIGN = {sign}\nclass Centre(Base, Explainer):\n    def attribute(self, *_): ...\n"
        )
        for name in ("my_base", "my_own_method"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module("my_own_method").Centre

    yield write
    for name in ("my_base", "my_own_method"):
        sys.modules.pop(name, None)


def test_editing_a_foreign_method_changes_its_description(own):
    first, same = (describe(own(1)()) for _ in range(2))
    assert first == same
    assert first != describe(own(-1)())
    assert first != describe(own(1, factor=2)()), "what it builds on is edited"
    assert first == describe(own(1)())


def test_a_class_without_a_file_has_no_source_digest():
    scope = {}
    exec("class Typed: pass", {"__name__": "nowhere"}, scope)
    assert source_digest(scope["Typed"]) is None


def test_a_label_beyond_the_logits_raises_and_is_named():
    with pytest.raises(ValueError, match="gives 1 logit per image, but the data has the label 1; it needs one"):
        check_classes_known(torch.tensor([0, 1]), torch.ones(2, 1))
    check_classes_known(torch.tensor([0, 1]), torch.ones(2, 2))
