"""The static HTML report: one self-contained file per results folder or comparison, which opens from disk."""

from labn.report.cards import Picture, make_card
from labn.report.page import Report, render
from labn.report.run_report import RunInfo, run_report
from labn.results.reader import StageResults, read_stage

__all__ = ["Picture", "Report", "RunInfo", "StageResults", "make_card", "read_stage", "render", "run_report"]
