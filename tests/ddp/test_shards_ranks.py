"""Scores from tar shards are those of the data module that wrote them, for any number of processes and workers."""

import csv

import pytest
from command_line import TINY, one_step, run

from datamodules import SyntheticFundus
from datamodules.io.tar_files import write_shards

pytestmark = pytest.mark.slow
QUICK = [word for word in TINY if ".n_" not in word]
SIZE = {"n_train": 24, "n_val": 8, "n_test": 13}


WORKERS = ["--data.init_args.num_workers=2"]


def table(folder):
    with open(folder / "test" / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_one_and_two_processes_with_and_without_workers_write_the_scores_of_the_original(tmp_path):
    write_shards(SyntheticFundus(**SIZE), tmp_path / "shards", 5)
    checkpoint = one_step(tmp_path / "fit")
    run("test", checkpoint, run_dir=tmp_path / "original")
    wanted = table(tmp_path / "original")
    assert len({row["index"] for row in wanted}) == SIZE["n_test"] // 2  # positive samples
    shards = [checkpoint, *QUICK, f"--data.init_args.root={tmp_path / 'shards'}"]
    for ranks, more in ((1, []), (1, WORKERS), (2, WORKERS)):
        config, run_dir = "configs/synthetic/quickstart_shards.yaml", tmp_path / f"{ranks} {len(more)}"
        run("test", *more, *shards, config=config, run_dir=run_dir, tiny=False, ranks=ranks)
        found = table(run_dir)
        if ranks == 1:
            assert found == wanted
        # Ranks see other batches, whose convolutions round differently in the last digits.
        assert [{**row, "value": None} for row in found] == [{**row, "value": None} for row in wanted]
        assert all(float(a["value"]) == pytest.approx(float(b["value"]), abs=1e-6) for a, b in zip(found, wanted))
