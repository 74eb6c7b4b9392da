"""Results of suites; they are read and written in `lorazor.measure.suite_rows`, where reports can reach them too."""

from lorazor.measure.suite_rows import FAILURES_FILE, RESULTS_FILE, SCHEMA, read_results, write_results

__all__ = ["FAILURES_FILE", "RESULTS_FILE", "SCHEMA", "read_results", "write_results"]
