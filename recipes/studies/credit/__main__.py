"""`run` and `report`, from the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from recipes.studies.credit.report import report
from recipes.studies.credit.run import RULES, TASKS, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.studies.credit", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    runs = commands.add_parser("run", help="run the trainings that --out does not have yet")
    runs.add_argument("--out", type=Path, required=True, metavar="DIR")
    runs.add_argument("--tasks", default=",".join(TASKS))
    runs.add_argument("--rules", default=",".join(RULES))
    runs.add_argument("--seeds", type=int, default=5, help="how many")
    runs.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    reports = commands.add_parser("report", help="write results.json, table.md and curves.png into DIR")
    reports.add_argument("out", type=Path, metavar="DIR")
    args = parser.parse_args()
    if args.command == "report":
        print(report(args.out))
        return 0
    unfinished = run(args.out, args.tasks.split(","), args.rules.split(","), args.seeds, args.jobs)
    if unfinished:
        print(f"{unfinished} trainings were not finished; run the same command again", file=sys.stderr)
    return 1 if unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
