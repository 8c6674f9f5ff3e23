#!/usr/bin/env python
"""Which truth holds for which model family: runs the tests that show it and prints a table.

Each cell is the tests of one column (marked ``column`` in ``tests/``) on one family's tiny pipeline: "12 ok" if all
of them passed, "2 of 12 FAIL" otherwise. Families without trainable text encoders pass that column by refusing the
flag in one line; their cell says so.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections import defaultdict
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
TESTS = [str(ROOT / "tests" / name) for name in ("test_block_skip.py", "test_families.py")]


COLUMNS = (
    *("E1", "E2", "E3", "E4", "E5", "E6"),
    *("validation", "export", "text encoder", "prior preservation", "captions", "buckets"),
)


class Collector:
    """A pytest plugin that keeps the outcome of every test with a column, by column and family."""

    def __init__(self) -> None:
        self.outcomes: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
        self.refusing: set[str] = set()
        self.seconds = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds += report.duration
        cell = dict(report.user_properties)
        if "column" in cell and (report.when == "call" or report.failed):
            self.outcomes[str(cell["column"])][str(cell["family"])].append(report.passed)
            if not cell["text"]:
                self.refusing.add(str(cell["family"]))


def table(collector: Collector) -> str:
    """The outcomes as a Markdown table."""
    columns = [column for column in COLUMNS if column in collector.outcomes]
    families = sorted({family for column in columns for family in collector.outcomes[column]})
    rows = [["family", *columns], ["---"] * (1 + len(columns))]
    for family in families:
        cells = []
        for column in columns:
            passed = collector.outcomes[column][family]
            cell = f"{len(passed)} ok" if passed and all(passed) else f"{passed.count(False)} of {len(passed)} FAIL"
            refused = column == "text encoder" and family in collector.refusing and all(passed)
            cells.append("refused" if refused else cell)
        rows.append([family, *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(argv: list[str] | None = None) -> int:
    """Run the script; the exit code is pytest's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", help="Only tests that match this pytest expression, such as a family's name.")
    parser.add_argument("--json", type=Path, help="Write the outcomes to this file as well.")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    collector = Collector()
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = pytest.main(
            [
                "-q",
                "-p",
                "no:cacheprovider",
                "-m",
                "column",
                "--rootdir",
                str(ROOT),
                *(["-k", args.k] if args.k else []),
                *TESTS,
            ],
            plugins=[collector],
        )
    if code != pytest.ExitCode.OK:
        print(output.getvalue())
    print(table(collector))
    print(f"\n{sum(len(p) for c in collector.outcomes.values() for p in c.values())} tests, {collector.seconds:.0f} s")
    if args.json:
        cells = {column: {name: [all(p), len(p)] for name, p in c.items()} for column, c in collector.outcomes.items()}
        args.json.write_text(json.dumps({"schema": 1, "passed_and_tests": cells}, indent=2) + "\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
