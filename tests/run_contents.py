"""What a run folder holds, in a form that can be compared, and which of its files are not whole."""

import csv
import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load

TABLES = ("scores.csv", "summary.csv", "paired.csv", "ranks.csv", "predictions.csv", "counts.csv")
TABLES += ("scores.parquet", "cards.json", "identity.json")


def table(data):
    if not data.endswith(b"\n"):
        raise ValueError("the last row is cut")
    header, *rows = csv.reader(io.StringIO(data.decode()))
    if any(len(row) != len(header) for row in rows):
        raise ValueError("a row has another length than the header")


def checkpoint(data):
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        if file.testzip():
            raise ValueError("a record does not have its checksum")
    torch.load(io.BytesIO(data), weights_only=False)


def page(data):
    if not data.rstrip().endswith(b"</html>"):
        raise ValueError("the page is cut")


def columns(data):
    from pyarrow import parquet

    parquet.read_table(io.BytesIO(data))


def arrays(data):
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


READERS = {
    ".safetensors": load,
    ".csv": table,
    ".parquet": columns,
    ".ckpt": checkpoint,
    ".html": page,
    ".npz": arrays,
    ".json": json.loads,
    ".yaml": yaml.safe_load,
    ".png": lambda data: Image.open(io.BytesIO(data)).load(),
}


def broken_files(run_dir):
    """`path: reason` for every file under its final name that cannot be read whole, but logs, which grow by rows."""
    broken = []
    for path in sorted(p for p in Path(run_dir).rglob("*") if p.is_file()):
        if path.name.startswith(".") or "logs" in path.parts:
            continue
        try:
            READERS[path.suffix](path.read_bytes())
        except Exception as error:
            broken.append(f"{path}: {error}")
    return broken


def contents(run_dir):
    """Everything in a finished run that must not depend on what happened on the way: name -> comparable value."""
    run_dir = Path(run_dir)
    found = {}
    for stage in sorted({path.parent for path in run_dir.rglob("scores.csv")}):
        name = stage.relative_to(run_dir)
        # Of an attempt without a checkpoint, and of a test during a fit, of what was the best checkpoint then.
        if name.parts[0].startswith(("fit.old-", "test.old-")):
            continue
        found |= {f"{name}/{file}": (stage / file).read_bytes() for file in TABLES if (stage / file).exists()}
        found[f"{name}/maps/manifest.json"] = (stage / "maps" / "manifest.json").read_bytes()
        found |= {f"{name}/curves/{k}": v.tobytes() for k, v in arrays((stage / "curves.npz").read_bytes()).items()}
        found |= {f"{name}/{path.name}": path.read_bytes() for path in (stage / "overlays").glob("*.png")}
        found |= {f"{name}/{k}": v for k, v in stored_maps(stage / "maps").items()}
        found[f"{name}/report.html"] = shown((stage / "report.html").read_text())
    for path in sorted((run_dir / "checkpoints").glob("*.ckpt")):
        saved = torch.load(path, weights_only=False)
        kept = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step")
        found |= {f"{path.name}/{key}": serialised(saved[key]) for key in kept}
    return found


def stored_maps(folder):
    """Every map by explainer, key and sample; how they are packed into files depends on ranks and restarts."""
    found = {}
    for path in folder.glob("*.safetensors"):
        shard = load(path.read_bytes())
        for index, heat in zip(shard["index"].tolist(), shard["maps"]):
            found[f"maps/{'.'.join(path.name.split('.')[:2])}/{index}"] = heat.numpy().tobytes()
    return found


def serialised(thing):
    """Nested state as text that is equal where every bit of every tensor is."""
    if isinstance(thing, torch.Tensor):
        return [str(thing.dtype), list(thing.shape), thing.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()]
    if isinstance(thing, dict):
        return {key: serialised(value) for key, value in thing.items()}
    return [serialised(value) for value in thing] if isinstance(thing, (list, tuple)) else thing


def shown(text):
    """A report without the place where its run lies."""
    return re.sub(r"(run_dir|default_root_dir): .*|(?<=ckpt_path: ).*(?=/checkpoints/)", r"\1", text)


def differences(a, b):
    """Names that only one of two contents has, or whose values differ."""
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
