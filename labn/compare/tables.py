"""A comparison as CSV, Markdown and LaTeX."""

from __future__ import annotations

from labn.compare.merge import Comparison, Row
from labn.results.tables import csv_bytes

TABLE = ("run", "explainer", "metric", "mean", "std", "seeds", "ci_low", "ci_high", "n")
PAIRED = ("row_a", "row_b", "metric", "difference", "ci_low", "ci_high", "n")
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


def paired_csv(comparison: Comparison) -> bytes:
    """`paired.csv`: differences between all pairs of rows on the same samples; bounds as in `table_csv`."""
    return csv_bytes(PAIRED, ((a, b, metric, i.mean, i.low, i.high, i.n) for a, b, metric, i in comparison.paired))


def markdown_table(comparison: Comparison) -> str:
    """A Markdown table with one line per row and one column per requested value.

    A cell is the mean ± the standard deviation over seeds, with the 95 % interval over samples.
    """
    header, rows = _cells(comparison)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def latex_table(comparison: Comparison) -> str:
    """The table of `markdown_table` as a LaTeX `tabular` for the package booktabs."""
    header, rows = _cells(comparison)
    body = [" & ".join(_tex(cell) for cell in row) + r" \\" for row in rows]
    columns = "ll" + "r" * (len(header) - 2)
    top = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", " & ".join(map(_tex, header)) + r" \\", r"\midrule"]
    return "\n".join([*top, *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    table = {(row.label, row.explainer, row.metric): row for row in comparison.rows}
    pairs = list(dict.fromkeys((row.label, row.explainer) for row in comparison.rows))
    rows = [[*pair, *(_cell(table.get((*pair, metric))) for metric in comparison.asked)] for pair in pairs]
    return ["run", "method", *comparison.asked], rows


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    spread = "" if row.std is None else f" ± {row.std:.3f}"
    return f"{row.interval.mean:.3f}{spread}{row.interval.bracketed}"


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text).replace("±", r"$\pm$")
