"""The sign of LABN's attention under every kind of guidance, over seeds: the table of the README.

    python tests/benchmarks/attention_sign.py --seeds 5 --start open random --out runs/attention_sign

Trains `configs/quickstart.yaml` without guidance, and with the mask detached, straight-through and soft; tests each
run, and prints per kind and seed the test accuracy, the AUROC and mass of the map against the lesion masks, and pid16.
`--start random` is the published start, a random map, with one learning rate for all and 3 epochs. A run whose results
are there is not trained again, so an interrupted study goes on where it was.
"""

import argparse
import csv
import itertools
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

KINDS = {
    "none": ["--model.init_args.guidance=null"],
    "detached": ["--model.init_args.guidance.mask_grad=detached"],
    "straight_through": [],
    "soft": [
        "--model.init_args.guidance.mask_grad=soft",
        "--model.init_args.guidance.map_weight=0.3",
    ],
}
STARTS = {
    "open": [],
    "random": [
        "--model.init_args.gate_margin=null",
        "--model.init_args.head_lr=1e-3",
        "--trainer.max_epochs=3",
    ],
}
COLUMNS = ("auroc", "mass", "pid16")


def train_and_test(kind: str, start: str, seed: int, folder: Path) -> None:
    """Run fit and test in `folder`, unless its results are already there."""
    if (folder / "test" / "summary.csv").exists():
        return
    common = ["--config=configs/quickstart.yaml", f"--run_dir={folder}", "--wandb=disabled"]
    common += [f"--seed_everything={seed}", f"--data.init_args.seed={seed}", "--trainer.enable_progress_bar=false"]
    common += KINDS[kind] + STARTS[start]
    for arguments in (["fit", *common], ["test", *common, "--ckpt_path=best"]):
        with open(folder / f"{arguments[0]}.log", "w") as log:
            subprocess.run([sys.executable, "cli.py", *arguments], check=True, stdout=log, stderr=log, env=os.environ)


def results(folder: Path) -> dict[str, float]:
    """Means of one run: map figures, those of `random`, and the test accuracy."""
    with open(folder / "test" / "summary.csv", newline="") as file:
        means = {(row["explainer"], row["metric"]): float(row["mean"]) for row in csv.DictReader(file)}
    with open(folder / "test" / "predictions.csv", newline="") as file:
        right = [row["label"] == row["prediction"] for row in csv.DictReader(file)]
    found = {column: means["labn", column] for column in COLUMNS}
    return {**found, **{f"random {c}": means["random", c] for c in COLUMNS}, "accuracy": mean(right)}


def main() -> None:
    """Run the study and print one line per kind and seed, and one per kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/attention_sign"))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--start", nargs="+", default=["open"], choices=list(STARTS))
    options = parser.parse_args()
    print("| guidance, start | seed | accuracy | AUROC | mass / random | pid16 | pid16 random |\n" + "|---" * 7 + "|")
    for start, kind in itertools.product(options.start, options.kinds):
        rows = []
        for seed in range(42, 42 + options.seeds):
            folder = options.out / f"{kind}-{start}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            train_and_test(kind, start, seed, folder)
            rows.append(results(folder))
            print(line(f"{kind}, {start} | {seed}", rows[-1]), flush=True)
        print(totals(f"{kind}, {start}", rows), flush=True)


def line(title: str, row: dict[str, float]) -> str:
    """One run as a table row."""
    ratio = row["mass"] / row["random mass"]
    figures = (
        f"{row['accuracy']:.3f} | {row['auroc']:.3f} | {ratio:.2f} | {row['pid16']:.3f} | {row['random pid16']:.3f}"
    )
    return f"| {title} | {figures} |"


def totals(title: str, rows: list[dict[str, float]]) -> str:
    """All seeds of one kind as a table row: means, deviations, and in how many the map beats `random` on pid16."""
    figures = [[r["auroc"] for r in rows], [r["mass"] / r["random mass"] for r in rows], [r["pid16"] for r in rows]]
    cells = [f"{mean(f):.3f} +- {stdev(f):.3f}" if len(f) > 1 else f"{f[0]:.3f}" for f in figures]
    above = sum(r["pid16"] > r["random pid16"] for r in rows)
    accuracy = mean(r["accuracy"] for r in rows)
    return f"| **{title}** | all | {accuracy:.3f} | {' | '.join(cells)} | above in {above} |"


if __name__ == "__main__":
    main()
