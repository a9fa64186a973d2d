"""`python cli.py shards` writes the data set that a configuration names."""

import pytest
import torch
from command_line import call_main
from small_voc import write_voc

from datamodules import SyntheticFundus, TarShards
from datamodules.io.tar_files import MANIFEST


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
    apart = ["--config", "configs/quickstart.yaml", f"--config={small}"]
    call_main(["shards", *apart, f"--out={tmp_path / 'apart'}"])
    assert (tmp_path / "apart" / MANIFEST).read_bytes() == (tmp_path / "out" / MANIFEST).read_bytes()
    with pytest.raises(SystemExit):
        call_main(["shards", "--config", "configs/shared/trainer.yaml", f"--out={tmp_path}"])
    assert "names no data module under `data:`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{init_args: {n_test: 4}}", "small.yaml: data: "),
        ("{class_path: datamodules.SyntheticFundus, init_args: {n_tset: 4}}", "did you mean n_test"),
        ("{class_path: datamodules.Synthetic}", "did you mean SyntheticFundus"),
    ],
)
def test_a_mistake_in_a_configuration_is_one_sentence(data, message, tmp_path, capsys):
    small = tmp_path / "small.yaml"
    small.write_text(f"data: {data}\n")
    with pytest.raises(SystemExit) as ended:
        call_main(["shards", f"--config={small}", f"--out={tmp_path}"])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in said
    assert len(said.splitlines()) == 1


def test_detection_data_is_refused_before_anything_is_written(tmp_path, capsys):
    root = write_voc(tmp_path / "voc")
    config = tmp_path / "voc.yaml"
    config.write_text(f"data: {{class_path: datamodules.VOC, init_args: {{root: {root}, image_size: 24}}}}\n")
    with pytest.raises(SystemExit) as ended:
        call_main(["shards", f"--config={config}", f"--out={tmp_path / 'out'}"])
    assert ended.value.code == 2
    assert "Samples of VOC carry boxes, difficult, labels too, which shards would lose" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
