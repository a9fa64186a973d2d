"""Every command of the READMEs is executed by a test or by `.ci/run`, and their worked examples work."""

import csv
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
from command_line import ROOT, TINY, call_main, environment, one_step
from safetensors.torch import save_file
from small_detectors import tiny

from labn import explain
from labn.lrp import relevance

READMES = [
    ROOT / name
    for name in (
        "README.md",
        "labn/README.md",
        "labn/lrp/README.md",
        "labn/metrics/README.md",
        "callbacks/README.md",
        "datamodules/README.md",
        "configs/README.md",
        "tests/README.md",
    )
]
TEXT = "\n".join(path.read_text() for path in READMES)
LESS = [*TINY, "--data.init_args.n_train=8", "--data.init_args.n_test=6", "--trainer.max_epochs=1"]
SMALL = [word for word in LESS if "n_t" not in word and "n_val" not in word]
PICTURES = [*SMALL, "--data.init_args.image_size=64", "--data.init_args.batch_size=4"]

HERE = {
    "python cli.py fit --config configs/quickstart.yaml": LESS,
    "python cli.py test --config configs/quickstart.yaml --ckpt_path best": LESS,
    "python cli.py fit --config configs/quickstart.yaml --seed_everything 43 --run_dir runs/seed43": LESS,
    "python cli.py test --config configs/quickstart.yaml --run_dir runs/seed43 --ckpt_path best": LESS,
    "python cli.py compare runs/quickstart runs/seed43 --out compared": [],
    "python cli.py explain --image my/picture.jpg --ckpt runs/quickstart/checkpoints/best.ckpt "
    "--method labn gradcam": [],
    "python cli.py explain --image my/pictures/cat --model timm/resnet18 --weights resnet18.safetensors "
    "--method lrp c3lrp gradcam --metric pid16": ["--image_size=64"],
    "python cli.py fit --config configs/pictures.yaml --data.init_args.root my/pictures "
    "--model.init_args.backbone timm/resnet18 --model.init_args.backbone_ckpt resnet18.safetensors": PICTURES,
    "python cli.py test --config configs/pictures.yaml --data.init_args.root my/pictures --ckpt_path best": PICTURES,
    "python cli.py fit --config configs/pictures.yaml --run_dir runs/my_net --data.init_args.root my/pictures "
    "--model.init_args.backbone my_net.SmallNet --model.init_args.backbone_options '{width: 16}'": PICTURES,
    "python cli.py explain --image my/picture.jpg --ckpt runs/my_net/checkpoints/best.ckpt --model my_net.SmallNet "
    "--method gradcam": [],
    "python cli.py fit --config my_run.yaml": SMALL,
    "python cli.py test --config my_run.yaml --ckpt_path best": SMALL,
}
"""Executed below, in this order, with arguments that make them small."""

ELSEWHERE = {
    "python3 -m venv .venv": ".ci/run",
    "pip install -q -e .": ".ci/run",
    "pip install -q -e '.[test]'": ".ci/run",
    "pip install -q -e '.[demo]'": ".ci/run",
    "pip install -q -e '.[export]'": ".ci/run",
    "python -m pytest -q -n auto": ".ci/run",
    "python -m pytest -q -n auto -m 'not slow'": ".ci/run",
    "python -m pytest -q tests/lrp": ".ci/run",
    "python -m pytest tests/devices": ".ci/run",
    "python cli.py fit --config configs/idrid/idrid_labn.yaml --config configs/shared/ddp.yaml": (
        "tests/test_readme.py::test_lines_for_several_nodes_parse"
    ),
    "python cli.py test --config configs/quickstart.yaml --config configs/shared/ddp_cpu.yaml --ckpt_path best": (
        "tests/ddp/test_ranks.py::test_processes_write_the_rows_of_one"
    ),
    "torchrun --nproc_per_node 2 cli.py test --config configs/quickstart.yaml --config configs/shared/ddp_cpu.yaml "
    "--ckpt_path best": "tests/test_readme.py::test_torchrun_writes_the_same_rows",
    "torchrun --nnodes 2 --node_rank 0 --nproc_per_node 4 --master_addr node0 --master_port 29500 cli.py fit "
    "--config configs/idrid/idrid_labn.yaml --config configs/shared/ddp.yaml "
    "--trainer.num_nodes 2 --trainer.devices 4": ("tests/test_readme.py::test_lines_for_several_nodes_parse"),
    "srun python cli.py fit --config configs/idrid/idrid_labn.yaml --config configs/shared/ddp.yaml "
    "--trainer.num_nodes 2 --trainer.devices 4": "tests/test_readme.py::test_lines_for_several_nodes_parse",
}
"""Executed by another test, in small, or by `.ci/run`; so is every experiment of `configs/`."""


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def commands():
    """Every command of the bash blocks, without comments, as `shlex` writes it."""
    found = []
    for line in "".join(blocks("bash")).splitlines():
        if re.match(r"\s*(for .* do|done)$", line):
            continue
        words = shlex.split(line, comments=True)
        words = [word.removeprefix(".venv/bin/") for word in words]
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            found.append(shlex.join(words[:end]))
            words = words[end + 1 :]
    return found


def on_an_experiment(command):
    """Whether a command runs an experiment of `configs/`, which `test_every_experiment_runs` does in small."""
    found = re.match(r"python cli\.py (?:fit|test) --config (configs/[\w/]+\.yaml)", command)
    return bool(found) and (ROOT / found[1]).is_file()


def has_own_tests(command):
    """Whether a command without a trainer has its own test file, `tests/commands/test_command_<name>.py`."""
    found = re.match(r"(?:do )?python cli\.py (\w+) ?", command)
    return bool(found) and (ROOT / "tests" / "commands" / f"test_command_{found[1]}.py").is_file()


def test_every_command_is_executed_somewhere():
    listed = {*HERE, *ELSEWHERE}
    assert listed <= set(commands())
    others = [command for command in commands() if command not in listed]
    assert [c for c in others if not on_an_experiment(c) and not has_own_tests(c)] == []
    for where in {*ELSEWHERE.values(), "tests/cli/test_configs.py::test_every_experiment_runs"}:
        file, _, name = where.partition("::")
        assert not name or f"def {name}(" in (ROOT / file).read_text()
    script = (ROOT / ".ci" / "run").read_text()
    assert "grep -m1" in script
    assert "README.md" in script


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder as a new user has it: the project's configurations, own pictures, weights, and the README's files."""
    folder = tmp_path_factory.mktemp("hour")
    (folder / "configs").symlink_to(ROOT / "configs")
    noise = np.random.default_rng(0)
    for label, light in (("cat", 200), ("dog", 60)):
        (folder / "my" / "pictures" / label).mkdir(parents=True)
        for number in range(12 if label == "dog" else 10):
            picture = noise.integers(0, light, (50, 60, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / "my" / "pictures" / label / f"{number}.jpg"), picture)
    shutil.copy(folder / "my" / "pictures" / "cat" / "0.jpg", folder / "my" / "picture.jpg")
    torch.manual_seed(0)
    save_file(timm.create_model("resnet18", num_classes=3).state_dict(), folder / "resnet18.safetensors")
    for text in [*blocks("python"), *blocks("yaml")]:
        if named := re.match(r"# (my_\w+\.(py|yaml))\n", text):
            (folder / named[1]).write_text(text)
    assert len(list(folder.glob("my_*"))) == 6
    return folder


@pytest.mark.slow
def test_a_new_users_hour(workplace, monkeypatch):
    """The commands in the README's order, in one folder."""
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(str(workplace))
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    ordered = [command for command in dict.fromkeys(commands()) if command in HERE]
    for command in ordered:
        call_main([*shlex.split(command)[2:], *HERE[command]])
    for run in ("quickstart", "seed43", "pictures", "my_run"):
        assert (workplace / "runs" / run / "test" / "report.html").is_file()
    table = (workplace / "compared" / "table.md").read_text()
    assert " ± " in table
    assert (workplace / "explained" / "overlays" / "picture.png").is_file()
    assert (workplace / "explained" / "maps" / "0.safetensors").is_file()
    with open(workplace / "runs" / "my_run" / "test" / "summary.csv", newline="") as file:
        own = {r["explainer"]: float(r["mean"]) for r in csv.DictReader(file) if r["metric"] == "compactness"}
    # Nothing positive; about a fifth of uniform noise; a tenth of a constant.
    assert own["centre"] == 0
    assert own["random"] == pytest.approx(0.19, abs=0.01)
    assert own["constant"] == pytest.approx(0.1, abs=0.01)


def test_relevance_passes_a_users_own_attention(workplace, monkeypatch):
    monkeypatch.syspath_prepend(str(workplace))
    torch.manual_seed(0)
    own = importlib.import_module("my_attention").Attention(16)
    head = torch.nn.Sequential(
        torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 2)
    )
    stem = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU())
    model, x = torch.nn.Sequential(stem, own, head).eval(), torch.randn(2, 3, 10, 10)
    targets = torch.tensor([0, 1])
    maps = explain(model, x, method="lrp", targets=targets).maps
    report = relevance(model, x, targets, report=True)
    assert torch.allclose(maps, report.relevance.sum(1))
    assert torch.allclose(report.arrived + report.leaked, report.initial, atol=1e-6)
    assert maps.abs().sum() > 0


@pytest.mark.slow
def test_torchrun_writes_the_same_rows(tmp_path):
    words = ["cli.py", "test", "--config", "configs/quickstart.yaml", one_step(tmp_path / "fit")]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    tables = []
    for name, command in (
        ("one", [sys.executable, *words]),
        ("two", [*start, *words, "--config", "configs/shared/ddp_cpu.yaml"]),
    ):
        done = subprocess.run(
            [*command, *TINY, f"--run_dir={tmp_path / name}"],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        tables.append((tmp_path / name / "test" / "predictions.csv").read_text().splitlines())
    assert [line.split(",")[:4] for line in tables[0]] == [line.split(",")[:4] for line in tables[1]]


@pytest.mark.parametrize("command", [c for c, where in ELSEWHERE.items() if where.endswith("nodes_parse")])
def test_lines_for_several_nodes_parse(command, monkeypatch, capsys):
    """There is one machine here, without GPU: configuration and arguments are read, nothing is started."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    with pytest.raises(SystemExit) as ended:
        call_main([*words[words.index("cli.py") + 1 :], "--print_config"])
    assert ended.value.code == 0
    assert "strategy: ddp" in capsys.readouterr().out


def test_the_files_named_in_the_readme_exist():
    for name in set(re.findall(r"`((?:configs|tests)/[\w/.]+\.(?:yaml|py))`", TEXT)):
        assert Path(ROOT, name).is_file(), name


def test_the_readme_is_short():
    text = READMES[0].read_text()
    assert len(text.splitlines()) <= 250
    assert len(text.encode()) <= 14_000


def test_links_between_the_readmes_lead_somewhere():
    for path in READMES:
        for target, anchor in re.findall(r"\]\(([\w/.]*\.(?:md|png|jpg))?(#[\w-]+)?\)", path.read_text()):
            other = path.parent / target if target else path
            assert other.is_file(), f"{path}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
                assert anchor[1:] in slugs, f"{path}: {target}{anchor}"


UNNAMED = [block for block in blocks("python") if not block.startswith("# my_")]


@pytest.mark.slow
@pytest.mark.parametrize("block", UNNAMED, ids=lambda block: block.splitlines()[0])
def test_a_python_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 3),
    ).eval()
    names = {
        "model": model,
        "images": torch.randn(2, 3, 64, 64),
        "maps": torch.rand(2, 64, 64),
        "targets": torch.tensor([0, 2]),
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "detector": tiny(num_classes=4, dtype=torch.float32).eval(),
        "image": torch.randn(3, 32, 32),
    }
    exec(compile(block, "README", "exec"), names)
