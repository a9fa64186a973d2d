"""`python cli.py coarse`: the patch sizes at which the score ranks an exact mask above coarse copies of it.

JSAI 2022, section 4.4, argues for patches because single pixels do not score fine maps fairly. On synthetic images the
truth is known: `configs/synthetic/coarse_fine.yaml` scores the exact lesion masks, and dilated and blurred copies of
them, at every patch size. This command evaluates the results.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from labn.errors import InputError, MissingFileError, printable
from labn.io.atomic import write_atomically
from labn.io.digits import decimals
from labn.io.readers import read_table
from labn.metrics.statistics import Interval, bootstrap_mean, paired_difference
from labn.postprocess.overlay import png_bytes

DETAILS = """\
Reads the results of:

  python cli.py test --config configs/synthetic/coarse_fine.yaml --ckpt_path runs/quickstart/checkpoints/best.ckpt
"""
SCORES = {"insertion": "insertion (higher is better)", "deletion": "deletion (lower is better)", "pid": "PID"}
"""Name of a score -> title of its panel."""


@dataclass(frozen=True)
class Scored:
    """The scores of one tested run.

    Attributes:
        path: the file that they come from.
        values: (explainer, metric) -> sample index -> value.
        explainers: names of the maps, in the order of the file.
        patch_sizes: sides in pixels at which there is an insertion score, sorted.
    """

    path: Path
    values: dict[tuple[str, str], dict[int, float]]
    explainers: tuple[str, ...]
    patch_sizes: tuple[int, ...]

    @classmethod
    def read(cls, run: Path) -> Scored:
        """Read `run/test/scores.csv`.

        Raises:
            MissingFileError: the run has not been tested.
        """
        path = run / "test" / "scores.csv"
        if not path.is_file():
            raise MissingFileError(
                f"{path} does not exist; run `cli.py test --config configs/synthetic/coarse_fine.yaml` first."
            )
        values: dict[tuple[str, str], dict[int, float]] = {}
        for row in read_table(path, ("index", "explainer", "metric", "value"), escaped=True):
            column = values.setdefault((row["explainer"], row["metric"]), {})
            column[row.number("index", int)] = row.number("value", float)
        matches = [re.fullmatch(r"insertion(\d+)", metric) for _, metric in values]
        sizes = {int(match[1]) for match in matches if match}
        return cls(path, values, tuple(dict.fromkeys(name for name, _ in values)), tuple(sorted(sizes)))

    def column(self, explainer: str, score: str, size: int) -> dict[int, float]:
        """Sample index -> insertion, deletion or PID (`score`) of a map at a patch size.

        Raises:
            InputError: the map does not have this score.
        """
        name = "id" if score == "pid" and size == 1 else f"{score}{size}"
        if (explainer, name) not in self.values:
            raise InputError(
                f"{self.path} has no {name} of {explainer}; each map needs insertion, deletion and PID at every size."
            )
        return self.values[explainer, name]

    def mean(self, explainer: str, score: str, size: int) -> Interval:
        """Mean of a score over samples with its 95 % interval."""
        return bootstrap_mean(list(self.column(explainer, score, size).values()))

    def lead(self, fine: str, coarse: str, score: str, size: int) -> Interval:
        """Mean advantage of the fine over the coarse map on the same samples, with its 95 % interval."""
        a, b = self.column(fine, score, size), self.column(coarse, score, size)
        # A low deletion score is good, so that the difference is taken the other way round.
        first, second = (b, a) if score == "deletion" else (a, b)
        return paired_difference(list(first), list(first.values()), list(second), list(second.values()))


def leads(scored: Scored, fine: str, coarse: Sequence[str], score: str) -> str:
    """Markdown table of the fine map's advantage over each coarse map; bold if its interval is above 0."""
    lines = [f"| ahead of | {' | '.join(f'm = {m}' for m in scored.patch_sizes)} |"]
    lines.append("|---" * (len(scored.patch_sizes) + 1) + "|")
    for name in coarse:
        cells = []
        for size in scored.patch_sizes:
            lead = scored.lead(fine, name, score, size)
            mark = "**" if lead.low > 0 else ""
            mean, low, high = (decimals(number, signed=True) for number in (lead.mean, lead.low, lead.high))
            cells.append(f"{mark}{mean}{mark} [{low}, {high}]")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(scored: Scored, fine: str, coarse: Sequence[str], score: str) -> str:
    """One sentence with the patch sizes at which the fine map is ahead of every coarse one, and behind one of them."""
    by_size = {size: [scored.lead(fine, name, score, size) for name in coarse] for size in scored.patch_sizes}
    above = [str(size) for size, row in by_size.items() if all(lead.low > 0 for lead in row)]
    below = [str(size) for size, row in by_size.items() if any(lead.high < 0 for lead in row)]
    return (
        f"{score}: {fine} is ahead of every coarse map (interval above 0) at m = {', '.join(above) or 'none'}; "
        f"behind one of them (interval below 0) at m = {', '.join(below) or 'none'}."
    )


def figure(scored: Scored) -> Figure:
    """Insertion, deletion and PID over the patch size, one line per map, with 95 % intervals over samples."""
    drawn = Figure(figsize=(12, 3.8), layout="constrained")
    axes = drawn.subplots(1, len(SCORES))
    styles = {"d": "--", "b": ":"}  # by the first letter of the name: dilated and blurred copies
    for axis, (score, title) in zip(axes, SCORES.items()):
        for number, name in enumerate(scored.explainers):
            points = [scored.mean(name, score, size) for size in scored.patch_sizes]
            middle = [p.mean for p in points]
            spread = [[p.mean - p.low for p in points], [p.high - p.mean for p in points]]
            # Shifted by a constant factor per map on the logarithmic axis, so that the error bars do not overlap.
            x = [2 ** (0.04 * (number - len(scored.explainers) / 2)) * size for size in scored.patch_sizes]
            style = styles.get(name[0], "-")
            axis.errorbar(x, middle, yerr=spread, label=name, linestyle=style, marker="o", markersize=3, linewidth=1.2)
        axis.set_xscale("log", base=2)
        axis.set_xticks(scored.patch_sizes, [str(size) for size in scored.patch_sizes])
        axis.set_xlabel("patch size m, pixels")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return drawn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--run", type=Path, default=Path("runs/coarse_fine"), help="tested run of coarse_fine.yaml")
    parser.add_argument("--fine", default="exact", help="name of the fine map (default: exact)")
    parser.add_argument("--coarse", nargs="+", help="names of the coarse maps (default: all dilated and blurred maps)")
    parser.add_argument("--out", type=Path, help="file of the figure (default: RUN/coarse_fine.png)")


def run(options: argparse.Namespace) -> None:
    """Print the advantage of the fine map, and draw the scores over the patch size.

    Raises:
        MissingFileError: the run has not been tested.
        InputError: a named map, every coarse map, or a score of a map is missing.
    """
    scored = Scored.read(options.run)
    coarse = options.coarse or [name for name in scored.explainers if name.startswith(("dilated", "blurred"))]
    if not coarse:
        raise InputError(f"{options.run} has no map called 'dilated' or 'blurred'; name the coarse ones with --coarse.")
    if not scored.patch_sizes:
        raise InputError(f"{scored.path} has no insertion at any patch size; test with metrics such as pid16.")
    for name in (options.fine, *coarse):
        if name not in scored.explainers:
            raise InputError(f"{options.run} has no map {name!r}; it has {', '.join(scored.explainers)}.")
    for score in SCORES:
        text = f"### {score}: {options.fine} ahead of\n\n{leads(scored, options.fine, coarse, score)}\n"
        print(printable(text, keep="\n"))
    print(printable("\n".join(verdict(scored, options.fine, coarse, score) for score in SCORES), keep="\n"))
    path = options.out or options.run / "coarse_fine.png"
    write_atomically(path, png_bytes(figure(scored), dpi=110))
    print(f"Drawn: {path}")
