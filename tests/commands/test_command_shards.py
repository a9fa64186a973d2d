"""`python cli.py shards` writes the data set that a configuration names."""

import pytest
import torch
from command_line import call_main

from datamodules import SyntheticFundus, TarShards


def test_the_command_writes_what_a_configuration_names(tmp_path, monkeypatch, request, capsys):
    monkeypatch.chdir(request.config.rootpath)
    small = tmp_path / "small.yaml"
    small.write_text("data:\n  init_args: {n_train: 6, n_val: 2, n_test: 4}\n")
    call_main(["shards", "--config", "configs/quickstart.yaml", str(small), f"--out={tmp_path / 'out'}"])
    assert "test, 4 samples in 1 shards" in capsys.readouterr().out
    data, painted = TarShards(tmp_path / "out"), SyntheticFundus(n_train=6, n_val=2, n_test=4)
    for number in range(4):
        first, second = painted.dataset("test")[number], data.dataset("test")[number]
        assert torch.equal(first["image"], second["image"])
        assert torch.equal(first["mask"], second["mask"])
    with pytest.raises(SystemExit):
        call_main(["shards", "--config", "configs/parts/trainer.yaml", f"--out={tmp_path}"])
    assert "names no data module under `data:`" in capsys.readouterr().err
