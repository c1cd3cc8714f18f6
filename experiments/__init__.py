"""Command line, runs, comparisons and reports."""
