"""Examine the zoo and print its table; exits with 1 if a row is wrong: ``python -m tests.zoo --help``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.zoo.examine import examined
from tests.zoo.models import ZOO
from tests.zoo.table import PATH, Row, document, pinned_in, row_of, rows_in, text_of


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parser().parse_args(argv)
    names = args.models or list(ZOO)
    if unknown := set(names) - set(ZOO):
        print(f"zoo: no models {sorted(unknown)}; known are {', '.join(ZOO)}", file=sys.stderr)
        return 2
    index, count = args.shard
    names = [name for name in ZOO if name in names][index - 1 :: count]
    start = time.perf_counter()
    rows: dict[str, Row] = {}
    problems: list[str] = []
    for name, found in zip(names, examined(names, jobs=args.jobs), strict=True):
        entry = ZOO[name]
        rows[name] = row_of(entry, found)
        wrong = [*found.unlike(entry), *found.inexact(entry), *([] if entry.in_full else found.not_followed(entry))]
        problems += wrong
        print(f"{len(rows)}/{len(names)} {'; '.join(wrong) or f'{name}: right'}", file=sys.stderr, flush=True)
    print(text_of(rows))
    if args.check:
        kept = rows_in(PATH.read_text(encoding="utf-8"))
        problems += [
            f"{name}: {PATH} differs from what is pinned; write it anew with --out {PATH}"
            for name, row in rows.items()
            if name not in kept or pinned_in(kept[name]) != pinned_in(row)
        ]
    if args.out is not None:
        kept = rows_in(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
        args.out.write_text(document({**kept, **rows}), encoding="utf-8")
    seconds = time.perf_counter() - start
    print("\n".join([f"{len(rows)} models in {seconds:.0f} s, {len(problems)} problems", *problems]), file=sys.stderr)
    return 1 if problems else 0


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected i/n with 1 <= i <= n, got {text!r}")
    return int(index), int(count)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these; default: all")
    parser.add_argument("--shard", type=_shard, default=(1, 1), metavar="i/n", help="only every n-th, from the i-th on")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes to run at once")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table here; rows of other models stay")
    parser.add_argument("--check", action="store_true", help=f"fail if the pinned columns differ from {PATH.name}")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
