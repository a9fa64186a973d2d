"""Every explainer and every metric gives the same rows on any number of ranks and nodes, in any batches and chunks."""

from __future__ import annotations

import csv
import re

import every_network
import pytest
import yaml
from command_line import ROOT, launch
from every_network import METRICS, NETWORKS, TABLES, callbacks, run_all, write_configs

from labn.explainers import EXPLAINERS
from labn.metrics.registry import REGISTRY

pytest.importorskip("pycocotools")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
DDP = "--trainer.strategy=ddp"

# Beside other images, and in batches of another size, the matrix products add up in another order (a single row is a
# product of its own kind), which moves logits and maps in their last float32 digits: by less than 1e-6, times a
# hundred in percent. The gap of completeness is divided by what may be a small logit. ADCC scales a map to [0, 1]
# first, which divides its digits by its range: the occlusion maps of the untrained lambda network range over .009 to
# .016 beside logits of .1, whose last digit (7e-9) becomes 1e-6. Values that depend on the order of pixels alone may
# jump further where two pixels of a map are equal but for such digits and change places; that is rare, and one place
# in a curve.
ROUNDING = 1e-6
SWAP, SWAPPED_SHARE = 1e-4, 0.01
SCALE = {
    "road": 100,
    "max_sensitivity": 10,
    "avg_sensitivity": 10,
    "completeness": 100,
    "sensitivity_n": 10,
    "mufidelity": 10,
    "emprt": 10,
    "average_drop": 100,
    "percent_increase": 100,
    "adcc": 10,
    "adcc_coherency": 10,
    "adcc_complexity": 10,
}
ORDER = re.compile(
    r"(errors_)?id|(insertion|deletion)1|pctin_\w+|randomisation|auroc|rank|iou|topk_localisation|random_logit|irof"
    r"|[se]mprt|mprt_layers"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Configurations of three networks, and the results of one process with batches of three in `one`."""
    folder = tmp_path_factory.mktemp("every")
    write_configs(folder)
    run_here(folder, "one")
    return folder


def run_here(folder, name, *more):
    with pytest.MonkeyPatch.context() as context:
        context.chdir(ROOT)
        run_all(folder, name, *more)


def rows(folder, run, network):
    with open(folder / run / network / "test" / TABLES[network], newline="") as file:
        return list(csv.DictReader(file))


def scale(row):
    """How many times `ROUNDING` a value may differ; a gap relative to a tiny change of the logit is of any size."""
    factor = SCALE.get(row.get("metric"), 1)
    return factor * max(1.0, abs(float(row["value"]))) if row.get("metric") == "completeness" else factor


def check(folder, run, networks=tuple(NETWORKS)):
    """The rows of `run` are those of `one`."""
    for network in networks:
        one, other = rows(folder, "one", network), rows(folder, run, network)
        assert [{**row, "value": None} for row in one] == [{**row, "value": None} for row in other]
        pairs = [(a, b, abs(float(a["value"]) - float(b["value"]))) for a, b in zip(one, other)]
        far = [pair for pair in pairs if pair[2] > ROUNDING * scale(pair[0])]
        swaps = [pair for pair in far if ORDER.fullmatch(pair[0].get("metric", "")) and pair[2] <= SWAP]
        assert [pair for pair in far if pair not in swaps] == []
        assert len(swaps) <= SWAPPED_SHARE * len(one)


def test_every_method_and_metric_is_compared(folder):
    """A new explainer or metric has to be put into `every_network` to be checked here."""
    assert {name for names in NETWORKS.values() for name in names} == set(EXPLAINERS)
    assert all(any(re.fullmatch(entry.pattern, name) for name in METRICS) for entry in REGISTRY)
    for network, names in NETWORKS.items():
        found = rows(folder, "one", network)
        assert {row["index"] for row in found} == set("012345")
        assert set(names) <= {row["explainer"] for row in found}


@pytest.mark.parametrize("size", [1, 7])
def test_scores_do_not_depend_on_the_batch_size(folder, size):
    run = f"batches of {size}"
    run_here(folder, run, f"--data.init_args.batch_size={size}")
    check(folder, run)


def test_scores_do_not_depend_on_the_chunk_size(folder, tmp_path):
    """Five inputs per forward in the metrics and in every explainer that has chunks, of batches of four."""
    for network in NETWORKS:
        config = yaml.safe_load((folder / f"{network}.yaml").read_text())
        config["trainer"]["callbacks"] = callbacks(network, chunk=5)
        (tmp_path / f"{network}.yaml").write_text(yaml.safe_dump(config))
    run_here(tmp_path, "chunks", "--data.init_args.batch_size=4")
    (folder / "chunks").symlink_to(tmp_path / "chunks")
    check(folder, "chunks")


def everywhere(folder, run, processes, *more):
    """Test every network on so many processes of this machine."""
    settings = [f"--trainer.devices={processes}", DDP, *more]
    launch(every_network.__file__, folder, run, *settings, processes=processes)


def test_two_processes_with_loader_workers_give_the_scores_of_one(folder):
    everywhere(folder, "two", 2, "--data.init_args.num_workers=2")
    check(folder, "two")


def test_three_processes_give_the_scores_of_one(folder):
    everywhere(folder, "three", 3)
    check(folder, "three")


def test_two_nodes_give_the_scores_of_one(folder):
    config, run_dir = folder / "residual.yaml", folder / "nodes" / "residual"
    launch("cli.py", "test", f"--config={config}", f"--run_dir={run_dir}", "--trainer.num_nodes=2", DDP, nodes=2)
    check(folder, "nodes", ["residual"])
