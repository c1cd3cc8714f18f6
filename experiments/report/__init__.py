"""The report of runs and comparisons: table, figures and one self-contained HTML page."""

from experiments.report.page import ReportFiles, write_report
from experiments.report.read import Run, Study, read_study
from experiments.report.table import comparison_table, print_table

__all__ = ["ReportFiles", "Run", "Study", "comparison_table", "print_table", "read_study", "write_report"]
