"""The examples in datamodules/README.md: every configuration parses, and the data set of one's own gives batches."""

import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.cli import LightningArgumentParser

import datamodules

README = Path(datamodules.__file__).with_name("README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
CONFIGURATIONS = [yaml.safe_load(text) for language, text in BLOCKS if language == "yaml"]


@pytest.mark.parametrize("config", CONFIGURATIONS, ids=lambda config: config.get("data", config)["class_path"])
def test_a_configuration_of_the_readme_builds_its_data_module(config):
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    parsed = parser.parse_object({"data": config.get("data", config)})
    assert isinstance(parser.instantiate_classes(parsed).data, datamodules.ImageDataModule)


def test_the_readme_describes_every_data_module():
    described = {config.get("data", config)["class_path"] for config in CONFIGURATIONS}
    modules = {f"datamodules.{name}" for name in datamodules.__all__}
    no_layouts = {"datamodules.Augmentation", "datamodules.Columns", "datamodules.ImageDataModule"}
    assert modules - no_layouts - described == {"datamodules.TarShards"}  # whose example is a command


def test_the_data_set_of_ones_own_gives_batches():
    (text,) = [text for language, text in BLOCKS if language == "python" and "class Stripes" in text]
    names: dict = {}
    exec(text, names)
    batch = next(iter(names["Stripes"](batch_size=4).test_dataloader()))
    assert batch["image"].shape == (4, 3, 48, 48)
    assert batch["label"].tolist() == [0, 1, 0, 1]
