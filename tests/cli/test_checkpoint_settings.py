"""What a checkpoint says about the model against what the configuration says."""

import pytest
import torch
import yaml
from command_line import TINY, call_main
from jsonargparse import Namespace

from callbacks.checkpoint import named_classes
from callbacks.logging.terminal import say_taken_over
from labn.models.backbones import build_network
from labn.modules.plain_checkpoints import check_same_class

HELD = {"hyper_parameters": {"_class_path": "labn.modules.LABN"}}


def test_another_class_is_refused_with_both_names():
    with pytest.raises(ValueError, match=r"a\.ckpt holds a labn\.modules\.LABN, but .* asks for a labn\.modules\.SSD"):
        check_same_class("a.ckpt", HELD, "labn.modules.SSD")


@pytest.mark.parametrize(
    ("content", "asked"),
    [(HELD, "labn.modules.LABN"), (HELD, "labn.modules.labn.LABN"), (HELD, None), ({}, "labn.modules.SSD"), (3, "x.Y")],
)
def test_the_same_or_no_class_is_accepted(content, asked):
    check_same_class("a.ckpt", content, asked)


def test_settings_that_the_checkpoint_replaces_are_named(caplog):
    asked = {"init_args": {"theta": 0.5, "backbone": "lambda_resnt", "lr": 1e-3}}
    built = {"init_args": {"theta": 0.5, "backbone": "lambda_resnet", "lr": 1e-3, "num_classes": 2}}
    with caplog.at_level("INFO"):
        say_taken_over("a.ckpt", asked, asked)
        say_taken_over("a.ckpt", asked, built)
    (said,) = caplog.messages
    assert said.endswith("a.ckpt was trained with: backbone lambda_resnet (not lambda_resnt).")


def test_every_class_that_a_configuration_names_is_known():
    nested = {"init_args": {"guidance": Namespace(class_path="mine.Guide"), "deep": [{"class_path": "mine.Part"}]}}
    assert named_classes(Namespace(class_path="mine.Net", **nested)) == {"mine.Net", "mine.Guide", "mine.Part"}
    assert named_classes({}) == named_classes("mine.Net") == set()


@pytest.fixture
def trained(tmp_path, monkeypatch, request):
    """Words of a run of one epoch, in whose folder `best` and `last` are."""
    monkeypatch.chdir(request.config.rootpath)
    saved = '[{"class_path": "callbacks.BestCheckpoint"}, {"class_path": "callbacks.LastCheckpoint"}]'
    words = ["--config", "configs/quickstart.yaml", *TINY, f"--trainer.callbacks={saved}", f"--run_dir={tmp_path}"]
    call_main(["fit", *words, "--trainer.max_epochs=1"])
    return words


@pytest.mark.slow
def test_defaults_and_linked_values_are_not_reported_as_replaced(trained, tmp_path, caplog):
    path = tmp_path / "checkpoints" / "best.ckpt"
    content = torch.load(path, weights_only=False)
    content["hyper_parameters"] |= {"num_classes": 3, "lr_patience": 5, "lr": 0.5}
    torch.save(content, path)
    with caplog.at_level("INFO"):
        call_main(["test", *trained, f"--ckpt_path={path}"])
    assert "was trained with: lr 0.5 (not 0.001)." in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("named", ["best", "last", "{}/checkpoints/best.ckpt"])
def test_a_named_checkpoint_is_the_network_of_its_file(named, trained, tmp_path, caplog):
    command = ["test", *trained, f"--ckpt_path={named.format(tmp_path)}"]
    with caplog.at_level("INFO"):
        call_main(command)
        assert "is built with the settings" not in caplog.text
        call_main([*command, "--model.init_args.theta=0.25"])
    assert f"{tmp_path / 'checkpoints'}/" in caplog.text
    assert "was trained with: theta 0.5 (not 0.25)." in caplog.text
    assert yaml.safe_load((tmp_path / "test.yaml").read_text())["model"]["init_args"]["theta"] == 0.5


@pytest.mark.slow
def test_the_weights_that_training_began_with_may_be_gone(tmp_path, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    start, words = tmp_path / "start.pt", ["--config", "configs/quickstart.yaml", *TINY, f"--run_dir={tmp_path}"]
    small = {"layers": [1, 1, 1], "width": 16, "stem_width": 32, "r": 7}
    torch.save(build_network("lambda_resnet", num_classes=2, **small).state_dict(), start)
    words += ["--trainer.callbacks=[]"]
    given = f"--model.init_args.backbone_ckpt={start}"
    call_main(["fit", *words, given, "--trainer.max_epochs=1", "--trainer.callbacks+=callbacks.LastCheckpoint"])
    start.unlink()
    call_main(["test", *words, "--ckpt_path=last"])
    assert yaml.safe_load((tmp_path / "test.yaml").read_text())["model"]["init_args"]["backbone_ckpt"] is None


@pytest.mark.slow
def test_a_fit_goes_on_with_the_settings_that_it_began_with(trained, tmp_path, caplog):
    with caplog.at_level("INFO"):
        call_main(["fit", *trained, "--ckpt_path=last", "--trainer.max_epochs=2"])
        assert "is built with the settings" not in caplog.text
        call_main(["fit", *trained, "--ckpt_path=last", "--trainer.max_epochs=3", "--model.init_args.theta=0.25"])
    assert "last.ckpt was trained with: theta 0.5 (not 0.25)." in caplog.text
    resolved = yaml.safe_load((tmp_path / "fit.yaml").read_text())
    assert (resolved["model"]["init_args"]["theta"], resolved["ckpt_path"]) == (0.5, None)


@pytest.mark.slow
def test_the_command_line_prints_replaced_settings(tmp_path, monkeypatch, request, caplog):
    monkeypatch.chdir(request.config.rootpath)
    run = ["--config", "configs/quickstart.yaml", *TINY, "--trainer.max_epochs=1", "--trainer.callbacks=[]"]
    call_main(["fit", *run, f"--run_dir={tmp_path / 'a'}", "--trainer.callbacks+=callbacks.LastCheckpoint"])
    (saved,) = (tmp_path / "a").rglob("last.ckpt")
    again = ["test", *run, f"--run_dir={tmp_path / 'b'}", f"--ckpt_path={saved}"]
    with caplog.at_level("INFO"):
        call_main([*again, "--model.init_args.theta=0.25"])
    assert "theta 0.5 (not 0.25)" in caplog.text
    with pytest.raises(ValueError, match=r"holds a labn\.modules\.LABN, but the configuration asks for a"):
        call_main([*again, "--model=labn.modules.Classifier", "--model.init_args.backbone=resnet18"])
