"""States of a checkpoint that have another form than the training's own are named before anything is restored."""

import lightning.pytorch as pl
import pytest
import torch
from fuzzing import fit, write_checkpoint

from callbacks.checkpoint import RunCheckpointIO
from labn.errors import InputError
from labn.launch.error_messages import restore_error
from labn.modules.restore import restore

EARLY = "EarlyStopping{'monitor': 'val/loss', 'mode': 'min'}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(folder)
    return folder


def resumed_with(run, tmp_path, change, epochs=1):
    content = torch.load(run / "stranger.ckpt", weights_only=True)
    change(content)
    torch.save(content, tmp_path / "changed.ckpt")
    fit(tmp_path / "run", epochs, tmp_path / "changed.ckpt")


def test_an_unchanged_checkpoint_is_restored(run, tmp_path):
    resumed_with(run, tmp_path, lambda content: None)


@pytest.mark.parametrize("flag", ["capturable", "differentiable"])
def test_how_a_step_is_computed_is_this_runs_own(run, tmp_path, flag):
    """A checkpoint of a GPU, or of a stranger, may say `capturable`, which no CPU can do."""

    def change(content):
        for group in content["optimizer_states"][0]["param_groups"]:
            group[flag] = True

    resumed_with(run, tmp_path, change, epochs=3)


def at(content, *keys):
    for key in keys:
        content = content[key]
    return content


LOOP, OPTIMIZER = ("loops", "fit_loop"), ("optimizer_states", 0)
WRONG = [
    ((*LOOP, "epoch_progress", "current"), {"processed": -9}, r"processed is -9 and must be"),
    ((*LOOP, "epoch_progress", "total"), {"completed": 7}, r"total is .* and must be counts that fall from ready"),
    ((*LOOP, "epoch_progress"), {"current": {"ready": 1}}, r"current is .* and must be counts of .*completed"),
    (LOOP, {"epoch_loop.batch_progress": []}, r"batch_progress is \[\] and must"),
    ((), {"global_step": "x"}, r"global_step is 'x' and must be a whole number from 0"),
    (("callbacks", EARLY), {"wait_count": None}, r"wait_count is None and must be a whole number"),
    (("callbacks", EARLY), {"best_score": 1}, r"best_score is 1 and must be a tensor of one number"),
    ((), {"optimizer_states": []}, r"optimizer_states is \[\] and must be a list of 1"),
    ((*OPTIMIZER, "state", 0), {"exp_avg": 0.5}, r"state\[0\]\.exp_avg is 0.5 and must be a tensor"),
    ((*OPTIMIZER, "state", 0), {"step": 0}, r"state\[0\]\.step is 0 and must be a number from 1"),
    ((*OPTIMIZER, "param_groups", 0), {"lr": -1.0}, r"AdamW refuses \(Invalid learning rate"),
    ((*OPTIMIZER, "param_groups"), {1: {"params": list(range(33))}}, r"params is \[0, .* and must be in order"),
    ((*OPTIMIZER, "param_groups", 1, "params"), {0: 0}, r"param_groups\[1\]\.params is \[0, .* and must be in order"),
    (("lr_schedulers", 0), {"step": 1}, r"lr_schedulers\[0\] is 'step' and must be"),
    (("lr_schedulers", 0), {"optimizer": 1}, r"lr_schedulers\[0\] is 'optimizer' and must be"),
    (
        (*OPTIMIZER, "param_groups", 0),
        {"weight_decay": 2**70},
        r"weight_decay is 1180591620717411303424 and must be",
    ),
    ((*OPTIMIZER, "state", 0), {"exp_avg": None}, r"state\[0\]\.exp_avg is None and must be a tensor"),
    (OPTIMIZER[:1], {0: {"param_groups": []}}, r"optimizer_states\[0\] is \['param_groups'\] and must be"),
    (("state_dict",), {"x": 1}, r"'x' in its state_dict is no tensor"),
    ((), {"pytorch-lightning_version": "x"}, r"cannot be restored \(InvalidVersion"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("place", "values", "message"), WRONG)
def test_a_state_of_another_form_is_named(run, tmp_path, place, values, message):
    def change(content):
        for key, value in values.items():
            at(content, *place)[key] = value

    with pytest.raises(InputError, match=message) as caught:
        resumed_with(run, tmp_path, change)
    assert str(tmp_path / "changed.ckpt") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_test_with_states_of_another_form_ends_with_a_sentence(run, tmp_path):
    content = torch.load(run / "stranger.ckpt", weights_only=True)
    content["callbacks"][EARLY]["patience"] = []
    torch.save(content, tmp_path / "changed.ckpt")
    from datamodules import SyntheticFundus
    from labn.modules import LABN

    branch = {"backbone_options": {"layers": [1, 1], "width": 4, "stem_width": 4, "r": 3}}
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=[pl.callbacks.EarlyStopping("val/loss")],
        plugins=[RunCheckpointIO([tmp_path])],
    )
    data = SyntheticFundus(n_train=4, n_val=2, n_test=2, image_size=48, batch_size=2)
    with pytest.raises(InputError, match=r"patience is \[\] and must be a whole number"):
        trainer.test(LABN("lambda_resnet", split=1, network_options=branch), data, tmp_path / "changed.ckpt")


def test_exhausted_memory_is_no_damaged_checkpoint():
    def restore_states():
        raise torch.OutOfMemoryError("full")

    code = compile("call()", "lightning/checkpoint_connector.py", "exec")
    with pytest.raises(torch.OutOfMemoryError) as caught:
        exec(code, {"call": restore_states})
    assert restore_error(caught.value, "a.ckpt") is None


def test_arguments_that_no_network_takes_are_named(run, tmp_path):
    content = torch.load(run / "stranger.ckpt", weights_only=True)
    content["hyper_parameters"]["bn_epochs"] = torch.ones(2)
    torch.save(content, tmp_path / "changed.ckpt")
    with pytest.raises(InputError, match=r"changed\.ckpt does not describe a network that can be built here: Boolean"):
        restore(tmp_path / "changed.ckpt")
