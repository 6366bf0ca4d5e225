"""Runs side by side: `python launch/report.py runs/samba_1 runs/samba_4 --output runs/report`.

A run is named by its `logging.dir`. Prints ranks, tokens/s/GPU, efficiency over the run of the
fewest ranks, peak memory, and the rank that the others waited for; --output adds JSON, a plot and
TensorBoard events.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fla_dist.benchmark.report import summarize, table, write


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="their logging.dir")
    parser.add_argument("--output", type=Path, help="folder for JSON, plot and TensorBoard events")
    arguments = parser.parse_args()
    try:
        rows = summarize(arguments.runs)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    if arguments.output:
        write(rows, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
