"""Which results form one row, and whose training they are taken for."""

import copy
import json
import shutil
import warnings

import pytest
import torch
import yaml
from small_stage import make_stage
from torch import nn

from labn.compare import compare_runs, open_runs
from labn.inference.fingerprint import weights_digest
from labn.report.comparison import comparison_report


def add_stage(run_dir, stage, checkpoint, **facts):
    """Another results folder of a run: those of its test, of other weights."""
    folder = run_dir / stage
    shutil.copytree(run_dir / "test", folder)
    path = folder / "maps" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "checkpoint": checkpoint, **facts}))
    return str(folder)


def labels(*words):
    return [run.label for run in open_runs([str(word) for word in words])]


def test_two_epochs_of_one_run_are_rows_of_their_own(tmp_path):
    make_stage(tmp_path / "run", 6)
    epochs = [add_stage(tmp_path / "run", f"val/epoch=00{n}", f"c{n}") for n in (0, 1)]
    found = compare_runs(open_runs(epochs))
    assert {(row.label, row.seeds, row.std) for row in found.rows} == {
        ("run/val/epoch=000", 1, None),
        ("run/val/epoch=001", 1, None),
    }


def test_two_tests_of_one_run_are_rows_of_their_own(tmp_path):
    make_stage(tmp_path / "run", 6)
    old = add_stage(tmp_path / "run", "test.old-1", "c0ffee")
    assert labels(tmp_path / "run", old) == ["run/test", "run/test.old-1"]
    # Given twice it is still the same row.
    assert labels(tmp_path / "run", tmp_path / "run" / "test") == ["run", "run"]


def test_seeds_of_several_stages_are_rows_by_stage(tmp_path):
    for seed in (1, 2):
        make_stage(tmp_path / f"seed{seed}", 6, seed=seed)
    first, second = (
        [tmp_path / f"seed{seed}" / "test", add_stage(tmp_path / f"seed{seed}", "test.old-1", f"old{seed}")]
        for seed in (1, 2)
    )
    row, old = "seed1/test", "seed1/test.old-1"
    assert labels(*first, *second) == [row, old, row, old]
    assert labels(*first, *reversed(second)) == [row, old, old, row]
    assert labels(*first, second[1]) == [row, old, old]


def test_a_second_training_with_a_seed_is_a_row_of_its_own(tmp_path):
    for name, seed in (("a", 1), ("b", 2), ("again", 2)):
        make_stage(tmp_path / name, 6, seed=seed)
    assert labels(*(tmp_path / name for name in ("a", "b", "again"))) == ["a", "a", "again"]


def test_an_error_names_the_stages_of_one_run(tmp_path):
    make_stage(tmp_path / "run", 6)
    validated = add_stage(tmp_path / "run", "val/epoch=000", "c0", split="val")
    with pytest.raises(ValueError, match=r"run/test and .*run/val/epoch=000 cannot be compared, they differ in split"):
        compare_runs(open_runs([str(tmp_path / "run"), validated]))


def test_a_missing_validation_names_its_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="run `validate` with an EvaluationCallback first"):
        open_runs([str(tmp_path)], "val/epoch=002")


def save(path, network, **more):
    path.parent.mkdir(exist_ok=True)
    state = {f"network.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": {**state, **more}}, path)


@pytest.fixture
def trained(tmp_path):
    """Two runs that differ in the seed, tested with their own best checkpoints."""
    for seed in (1, 2):
        torch.manual_seed(seed)
        network = nn.Linear(3, 2)
        make_stage(tmp_path / f"seed{seed}", 6, seed=seed, checkpoint=weights_digest(network))
        folder = tmp_path / f"seed{seed}" / "checkpoints"
        save(folder / "last.ckpt", nn.Linear(3, 2))
        save(folder / "best.ckpt", network, **{"network.aux1.fc.weight": torch.zeros(1)})
    return tmp_path


def test_results_of_the_folders_own_checkpoint_are_seeds(trained):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert labels(trained / "seed1", trained / "seed2") == ["seed1", "seed1"]


def retest(folder, checkpoint):
    """Let the results of a run be of these weights."""
    manifest = folder / "test" / "maps" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"checkpoint": checkpoint}))


def test_only_metrics_that_both_runs_scored_must_have_one_source(tmp_path):
    sources = [{"own": "1"}, {}, {"own": "1", "other": "x"}, {"own": "2"}]
    folders = [make_stage(tmp_path / f"run{n}", 6, sources=found) for n, found in enumerate(sources)]
    compare_runs(open_runs([f"{n}={folder}" for n, folder in enumerate(folders[:3])]))
    with pytest.raises(ValueError, match="they differ in the source code of own: 1 and 2"):
        compare_runs(open_runs([f"a={folders[0]}", f"b={folders[3]}"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_test_in_another_precision_is_of_the_same_weights(trained, dtype):
    network = nn.Linear(3, 2)
    save(trained / "seed2" / "checkpoints" / "best.ckpt", network)
    retest(trained / "seed2", weights_digest(copy.deepcopy(network).to(dtype)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert labels(trained / "seed1", trained / "seed2") == ["seed1", "seed1"]


def test_a_networks_own_part_may_be_called_like_an_auxiliary_head(trained):
    network = nn.ModuleDict({"aux1": nn.Linear(3, 2), "head": nn.Linear(2, 2)})
    save(trained / "seed2" / "checkpoints" / "best.ckpt", network)
    retest(trained / "seed2", weights_digest(network))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert labels(trained / "seed1", trained / "seed2") == ["seed1", "seed1"]


def test_results_of_an_earlier_training_are_not_taken_for_those_of_the_present_one(trained):
    save(trained / "seed2" / "checkpoints" / "best.ckpt", nn.Linear(3, 2))
    words = [str(trained / f"seed{seed}") for seed in (1, 2)]
    with pytest.warns(
        UserWarning, match=r"seed2/test holds results of weights that no checkpoint in .*checkpoints has"
    ):
        runs = open_runs(words)
    assert [run.label for run in runs] == ["seed1", "seed2"]
    report = comparison_report(compare_runs(runs))
    assert any("seed2/test are in no checkpoint of its run folder" in note for note in report.caveats)
    lines = {series.name for panel in report.training for series in panel.series}
    assert lines == {"train/seed1 (seed1)", "val/seed1 (seed1)"}
    assert [name for name, _ in report.configs] == [f"{words[0]}/fit.yaml"]


@pytest.mark.parametrize("damage", ["none left", "unreadable", "no checkpoint"])
def test_unknown_weights_cause_no_warning(trained, damage):
    folder = trained / "seed2" / "checkpoints"
    if damage == "none left":
        shutil.rmtree(folder)
    elif damage == "unreadable":
        (folder / "best.ckpt").write_bytes(b"x")
    else:
        torch.save({"weights": torch.zeros(1)}, folder / "best.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert labels(trained / "seed1", trained / "seed2") == ["seed1", "seed1"]


def test_validations_are_those_of_the_fit_whatever_checkpoints_are_kept(trained):
    epoch = add_stage(trained / "seed1", "val/epoch=000", "c0ffee", split="val")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (run,) = open_runs([epoch])
    assert run.config["seed_everything"] == 1


def test_the_training_of_two_results_of_one_run_is_shown_once(tmp_path):
    make_stage(tmp_path / "run", 6)
    words = [str(tmp_path / "run"), add_stage(tmp_path / "run", "test.old-1", "c0ffee")]
    report = comparison_report(compare_runs(open_runs(words)))
    lines = {series.name for panel in report.training for series in panel.series}
    assert lines == {f"{stage}/run/test, run/test.old-1 (run)" for stage in ("train", "val")}
    assert len(report.configs) == 1
    assert len({title for title, _ in report.made_with}) == len(report.made_with)
    assert yaml.safe_load(report.configs[0][1])["seed_everything"] == 42
