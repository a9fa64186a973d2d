"""A comparison as CSV, Markdown and LaTeX."""

from __future__ import annotations

from labn.compare.merge import Comparison, Row
from labn.io.digits import decimals
from labn.io.table_cells import csv_bytes

TABLE = ("run", "explainer", "metric", "mean", "std", "seeds", "ci_low", "ci_high", "n")
PAIRED = ("row_a", "row_b", "metric", "difference", "ci_low", "ci_high", "n", "p", "p_adjusted")
SEEDS = ("run", "folder", "seed", "explainer", "metric", "mean", "n")
RANKS = ("row", "metric", "rank", "rank_low", "rank_high", "p_best", "n")
# Special characters of LaTeX -> commands; replaced character by character, so that no command is replaced again.
_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def table_csv(comparison: Comparison) -> bytes:
    """`table.csv`: one line per run, method and value, with all digits.

    `std` is empty for one seed; `ci_low` and `ci_high` are NaN for one sample or one group.
    """
    rows = (
        (
            *(r.label, r.explainer, r.metric),
            *(r.interval.mean, "" if r.std is None else r.std, r.seeds),
            *(r.interval.low, r.interval.high, r.interval.n),
        )
        for r in comparison.rows
    )
    return csv_bytes(TABLE, rows)


def seeds_csv(comparison: Comparison) -> bytes:
    """`seeds.csv`: the mean of every trained network, of which a line of `table.csv` is the mean.

    `seed` is empty where the training is unknown; `folder` is the first results folder of the network.
    """
    trained = {(run.label, run.checkpoint): run for run in reversed(comparison.runs)}
    rows = (
        (r.label, run.results.folder, "" if run.seed is None else run.seed, r.explainer, r.metric, mean, r.interval.n)
        for r in comparison.rows
        for run, mean in ((trained[r.label, network], mean) for network, mean in r.networks.items())
    )
    return csv_bytes(SEEDS, rows)


def paired_csv(comparison: Comparison) -> bytes:
    """`paired.csv`: differences between all pairs of rows on the same samples; bounds as in `table_csv`.

    `p` is of the pair alone, `p_adjusted` of all pairs of the metric taken together.
    """
    differences = comparison.paired
    rows = ((a, b, metric, d.mean, d.low, d.high, d.n, d.p, d.p_adjusted) for a, b, metric, d in differences)
    return csv_bytes(PAIRED, rows)


def ranks_csv(comparison: Comparison) -> bytes:
    """`ranks.csv`: for every row and requested value its rank (1 is best), the rank's 95 % interval, and `p_best`.

    `p_best` is the probability over resamples of the samples that the row is the best.
    """
    rows = ((row, metric, r.rank, r.low, r.high, r.p_best, r.n) for row, metric, r in comparison.ranks)
    return csv_bytes(RANKS, rows)


def markdown_table(comparison: Comparison) -> str:
    """A Markdown table with one line per row and one column per requested value.

    `seeds` is the number of trained networks. A cell is the mean ± the standard deviation over
    seeds, with the 95 % interval over samples.
    """
    header, rows = _cells(comparison)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def latex_table(comparison: Comparison) -> str:
    """The table of `markdown_table` as a LaTeX `tabular` for the package booktabs."""
    header, rows = _cells(comparison)
    body = [" & ".join(_tex(cell) for cell in row) + r" \\" for row in rows]
    columns = "llr" + "r" * (len(header) - 3)
    top = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", " & ".join(map(_tex, header)) + r" \\", r"\midrule"]
    return "\n".join([*top, *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    table = {(row.label, row.explainer, row.metric): row for row in comparison.rows}
    # All values of a row are of the same networks, see `compare_runs`.
    pairs = {(row.label, row.explainer): str(row.seeds) for row in comparison.rows}
    rows = [
        [*pair, seeds, *(_cell(table.get((*pair, metric))) for metric in comparison.asked)]
        for pair, seeds in pairs.items()
    ]
    return ["run", "method", "seeds", *comparison.asked], rows


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    spread = "" if row.std is None else f" ± {decimals(row.std)}"
    return f"{decimals(row.interval.mean)}{spread}{row.interval.bracketed}"


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text).replace("±", r"$\pm$")
