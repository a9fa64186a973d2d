"""Bad input ends with one sentence that says what is wrong."""

import warnings

import pytest
import torch
from command_line import TINY, call_main
from lightning.pytorch.utilities.exceptions import MisconfigurationException

QUICKSTART = ["--config", "configs/quickstart.yaml", *TINY]
PARTS = "lightning.pytorch.strategies"


@pytest.fixture
def root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.mark.usefixtures("root")
def test_best_without_a_run_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--ckpt_path best: .*best.ckpt does not exist; run fit"):
        call_main(["test", *QUICKSTART, f"--run_dir={tmp_path}", "--ckpt_path=best"])


def test_the_run_folder_is_named_after_the_first_configuration(tmp_path, monkeypatch, request):
    configs = request.config.rootpath / "configs"
    (tmp_path / "mine.yaml").write_text(f"include: [{configs / 'quickstart.yaml'}]")
    monkeypatch.chdir(tmp_path)
    command = ["test", "-c", "mine.yaml", "--config", str(configs / "shared" / "ddp_cpu.yaml"), "--ckpt_path=best"]
    with pytest.raises(FileNotFoundError, match=r"runs/mine/checkpoints/best\.ckpt"):
        call_main(command)


@pytest.mark.usefixtures("root")
def test_inference_mode_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"set trainer.inference_mode to false"):
        call_main(["test", *QUICKSTART, f"--run_dir={tmp_path}", "--trainer.inference_mode=true"])


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    "strategy",
    [
        "fsdp",
        "fsdp_cpu_offload",
        "deepspeed_stage_3",
        *(f"{PARTS}.{n}" for n in ("FSDPStrategy", "ModelParallelStrategy")),
    ],
)
def test_sharded_strategies_are_refused_with_what_to_use(tmp_path, strategy):
    name = strategy.rsplit(".", 1)[-1]
    with pytest.raises(
        MisconfigurationException, match=rf"^trainer\.strategy is .*{name}, .*set trainer.strategy to ddp"
    ):
        call_main(["fit", *QUICKSTART, f"--run_dir={tmp_path}", f"--trainer.strategy={strategy}"])
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("root")
def test_an_unknown_key_is_named(tmp_path, capsys):
    (tmp_path / "typo.yaml").write_text("data:\n  init_args:\n    batchsize: 4\n")
    with pytest.raises(SystemExit):
        call_main(["fit", *QUICKSTART, "--config", str(tmp_path / "typo.yaml")])
    assert "batchsize" in capsys.readouterr().err


@pytest.mark.usefixtures("root")
def test_a_missing_configuration_is_named():
    with pytest.raises(FileNotFoundError, match=r"--config nowhere.yaml is not a file"):
        call_main(["fit", "--config", "nowhere.yaml"])


@pytest.mark.slow
@pytest.mark.usefixtures("root")
def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    run = [*QUICKSTART, f"--run_dir={tmp_path}", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    call_main(["fit", *run])
    # Of a file that knows how it was built the network is built again; this one holds weights alone.
    path = tmp_path / "checkpoints" / "best.ckpt"
    torch.save({**torch.load(path, weights_only=False), "hyper_parameters": {}}, path)
    narrow = '{"backbone_options": {"layers": [1, 1, 1], "width": 8, "stem_width": 32, "r": 7}}'
    other = f"--model.init_args.network_options={narrow}"
    with pytest.raises(ValueError, match=r"best.ckpt is of another architecture .*\(first: "):
        call_main(["test", *run, "--ckpt_path=best", other])


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("command", ["test", "validate"])
def test_random_weights_are_refused(tmp_path, command):
    with pytest.raises(ValueError, match=r"weights of lambda_resnet \(first: .*\) are random: give --ckpt_path"):
        call_main([command, *QUICKSTART, f"--run_dir={tmp_path}"])
    assert not list(tmp_path.rglob("scores.csv"))


@pytest.mark.usefixtures("root")
def test_monitored_validation_values_without_validation_raise_before_training(tmp_path):
    log = tmp_path / "logs" / "fit" / "metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_text("epoch,val/loss\n0,1.0\n")
    fit = ["fit", *QUICKSTART, f"--run_dir={tmp_path}", "--trainer.limit_val_batches=0", "--trainer.max_epochs=1"]
    with pytest.raises(
        ValueError, match=r"^trainer\.limit_val_batches is 0, so that EarlyStopping never gets its monitored value val/"
    ):
        call_main(fit)
    assert log.exists()
    with pytest.raises(ValueError, match=r"is 0, so that ReduceLROnPlateau never gets its monitored value val/loss"):
        call_main([*fit, "--trainer.callbacks=[]"])


@pytest.mark.usefixtures("root")
def test_default_root_dir_is_ignored_with_a_warning(tmp_path):
    fit = ["fit", *QUICKSTART, "--trainer.max_epochs=0", "--trainer.callbacks=[]", f"--run_dir={tmp_path / 'run'}"]
    with pytest.warns(UserWarning, match=r"trainer\.default_root_dir .*elsewhere is ignored; files go to --run_dir"):
        call_main([*fit, f"--trainer.default_root_dir={tmp_path / 'elsewhere'}"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="trainer.default_root_dir")
        call_main([*fit, f"--trainer.default_root_dir={tmp_path / 'elsewhere' / '..' / 'run'}"])


@pytest.mark.usefixtures("root")
def test_a_number_of_classes_that_would_be_ignored_is_refused(tmp_path):
    with pytest.raises(ValueError, match="num_classes=5 has no effect, because the data has"):
        call_main(["fit", *QUICKSTART, f"--run_dir={tmp_path}", "--model.init_args.num_classes=5"])


@pytest.mark.usefixtures("root")
def test_wandb_mode_is_checked(tmp_path):
    with pytest.raises(ValueError, match="must be offline, online or disabled"):
        call_main(["fit", *QUICKSTART, f"--run_dir={tmp_path}", "--wandb=yes"])


@pytest.mark.usefixtures("root", "random_weights_allowed")
def test_a_nan_in_a_map_names_the_sample(tmp_path, monkeypatch):
    from labn.explainers import ConstantMap

    monkeypatch.setattr(
        ConstantMap, "attribute", lambda self, model, images, *_: torch.full_like(images[:, 0], torch.nan)
    )
    with pytest.raises(ValueError, match=r"map of sample \d+ holds NaN"):
        call_main(["test", *QUICKSTART, f"--run_dir={tmp_path}"])


@pytest.mark.usefixtures("root")
def test_fit_of_data_without_a_training_split_is_refused_before_the_network_is_built(tmp_path, monkeypatch):
    """The weights do not exist, which building the network would complain about."""
    monkeypatch.setenv("LABN_DATA", str(tmp_path))
    command = ["fit", "--config", "configs/imagenet/imagenet_compare.yaml", f"--run_dir={tmp_path}/run"]
    with pytest.raises(ValueError, match=r"ImageNet has no training split, so this configuration can only be tested"):
        call_main(command)
    assert not (tmp_path / "run" / "logs").exists()
