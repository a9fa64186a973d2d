"""Small results folders made by hand: known numbers, names that try to break out of the page."""

import json

import numpy as np
import yaml

from labn.io.atomic import write_atomically
from labn.report import Picture, make_card
from labn.report.cards import fill_uri, steps_text
from labn.results.store import ResultStore, ScoreShard
from labn.results.tables import Plan, write_results

HOSTILE = '</script><script>document.title="broken"</script><img src=x onerror=alert(1)>&"\'\u2028.png'
CLASSES = ["healthy", "<b>lesions</b>"]
EXPLAINERS = ("gradcam", "-lrp")
METRICS = ("pid16", "mass")
SIZE, PATCH, POINTS = 64, 16, 5


def sample_name(index):
    return HOSTILE if index == 3 else f"image_{index:03d}"


def value(explainer, metric, index, shift=0.0):
    """Any known number: distinct per sample, so that sorting by it has one answer."""
    return round(np.sin(1.7 * index + len(explainer) + 3 * len(metric)), 3) + shift


def curves(explainer, index):
    x = np.linspace(0, 1, POINTS)
    return x, x ** (1 + index % 3), 1 - x ** (2 + len(explainer) % 2)


def score_parts(count, shift=0.0, explainers=EXPLAINERS):
    index = np.arange(count)
    for explainer in explainers:
        lines = [np.stack(line) for line in zip(*(curves(explainer, i) for i in index))]
        yield ScoreShard(
            explainer=explainer,
            key=explainer,
            index=index,
            label=index % 2,
            target=index % 2,
            prediction=(index % 3 > 0).astype(int),
            probability=(index + 1) / (count + 1),
            values={metric: np.array([value(explainer, metric, i, shift) for i in index]) for metric in METRICS},
            keys={metric: metric for metric in METRICS},
            curves={"pid16/index": index, **{f"pid16/{n}": v for n, v in zip(("x", "insertion", "deletion"), lines)}},
        )


def card(index, count, explainers=EXPLAINERS):
    noise = np.random.default_rng(index)
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[10:30, 20:40] = True
    picture = Picture(
        index=index,
        name=sample_name(index),
        label=index % 2,
        prediction=int(index % 3 > 0),
        target=index % 2,
        probability=(index + 1) / (count + 1),
        confidence=0.75,
        image=noise.random((SIZE, SIZE, 3)),
        mask=mask if index % 2 else None,
    )
    maps = {name: noise.random((SIZE, SIZE)) - (0.5 if name.startswith("-") else 0) for name in explainers}
    side = SIZE // PATCH
    steps = {name: steps_text(noise.permutation(side * side).reshape(side, side) // 4) for name in explainers}
    fill = fill_uri(np.zeros((1, 1, 3)), SIZE)
    return make_card(picture, maps) | {"steps": steps, "fills": [fill, fill]}


def make_stage(run_dir, count=24, shift=0.0, seed=42, explainers=EXPLAINERS, groups=None, **manifest):
    """A run folder with `fit.yaml`, a training log and `test/`; returns `test/`."""
    folder = run_dir / "test"
    store = ResultStore(folder)
    for part in score_parts(count, shift, explainers):
        store.add_scores(part)
    plan = Plan(dict(zip(explainers, explainers)), {m: (m, (m,)) for m in METRICS}, frozenset(range(count)))
    facts = {
        "checkpoint": f"{run_dir.name}{seed}",
        "data": "d47a",
        "split": "test",
        "target": "label",
        "metrics": list(METRICS),
        "class_names": CLASSES,
        "explainers": {name: {"class": name, "layer": None} for name in explainers},
        "settings": {"fill": "black", "positives_only": False, "chunk_size": 8},
        **manifest,
    }
    write_results(store, plan, "test", sample_name, facts, groups)
    cards = [card(index, count, explainers) for index in range(count)]
    write_atomically(folder / "cards.json", json.dumps(cards).encode())
    config = {"seed_everything": seed, "model": {"class_path": "M"}, "trainer": {"max_epochs": 3}, "data": {}}
    (run_dir / "fit.yaml").write_text(yaml.safe_dump(config))
    log = run_dir / "logs" / "fit"
    log.mkdir(parents=True)
    rows = ["epoch,step,train/loss,val/loss", *(f"{e},{e},,{1 / (e + 1)}\n{e},{e},{2 / (e + 1)}," for e in range(3))]
    (log / "metrics.csv").write_text("\n".join(rows) + "\n")
    return folder
