"""Reports on run directories: what a run did, and where two runs part. Plain values and text, without torch."""

from deepseek_mp.report.difference import RunDifference, compare_runs
from deepseek_mp.report.difference_text import render_difference
from deepseek_mp.report.summary import RunReport, report_run
from deepseek_mp.report.text import render_outcome, render_report

__all__ = [
    "RunDifference",
    "RunReport",
    "compare_runs",
    "render_difference",
    "render_outcome",
    "render_report",
    "report_run",
]
