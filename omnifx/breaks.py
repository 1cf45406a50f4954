"""Graph breaks: where Dynamo could not go on, why, and the line of source code it stopped at."""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch._dynamo import utils as dynamo

_NUM_METRICS = 4096  # Dynamo keeps 64 records of compiled frames; a model of many pieces has more


@dataclass(frozen=True)
class GraphBreak:
    """One place where the model falls apart into several graphs.

    Attributes:
        reason: What Dynamo could not do, in one sentence.
        file: Path of the source file, from the package or the working folder on.
        line: Line number in that file; 0 if unknown.
        source: That line, stripped; empty if the file cannot be read.
        count: How often a capture stopped there.
    """

    reason: str
    file: str
    line: int
    source: str
    count: int = 1

    @property
    def place(self) -> str:
        """`file:line`."""
        return f"{self.file}:{self.line}"

    def __str__(self) -> str:
        times = f" ({self.count} times)" if self.count > 1 else ""
        return f"graph break at {self.place}{times}: {self.reason}\n    {self.source}".rstrip()


@contextmanager
def watch_breaks() -> Iterator[list[GraphBreak]]:
    """Collect the graph breaks of everything that is captured inside; the list is filled at the end."""
    found: list[GraphBreak] = []
    num_reasons = len(dynamo.graph_break_reasons)
    num_kept = dynamo._compilation_metrics.maxlen or _NUM_METRICS
    dynamo.set_compilation_metrics_limit(_NUM_METRICS)
    before = dynamo.get_compilation_metrics()  # kept alive, so that no new record gets the identity of an old one
    seen = {id(metrics) for metrics in before}
    try:
        yield found
    finally:
        stops = [_of_stack(reason) for reason in dynamo.graph_break_reasons[num_reasons:]]
        for metrics in dynamo.get_compilation_metrics():
            if id(metrics) not in seen and metrics.fail_reason and metrics.fail_user_frame_filename:
                stops.append(
                    _stop(metrics.fail_reason, metrics.fail_user_frame_filename, metrics.fail_user_frame_lineno or 0)
                )
        found.extend(_merged(stops))
        dynamo.set_compilation_metrics_limit(num_kept)


def known_breaks() -> tuple[GraphBreak, ...]:
    """The graph breaks that Dynamo remembers, of all models of this process since its last reset."""
    return _merged([_of_stack(reason) for reason in dynamo.graph_break_reasons])


def _of_stack(reason: object) -> GraphBreak:
    stack = list(getattr(reason, "user_stack", None) or ())
    own = [frame for frame in stack if "/torch/" not in frame.filename] or stack
    file, line = (own[-1].filename, own[-1].lineno or 0) if own else ("unknown", 0)
    return _stop(str(getattr(reason, "reason", reason)), file, line)


def _stop(text: str, file: str, line: int) -> GraphBreak:
    return GraphBreak(
        reason=_sentence(text), file=_short(file), line=line, source=linecache.getline(file, line).strip()
    )


def _sentence(text: str) -> str:
    """The heading and the explanation of one of Dynamo's messages, without hints, links and context."""
    lines = [line.strip() for line in text.strip().splitlines()]
    heading = lines[0].rstrip(".:") if lines else "unknown"
    if heading.startswith("generic_jump"):  # Dynamo's own word for it, where it can go on behind the condition
        return "Data-dependent branching. Which way to go depends on the value of a tensor."
    explained = next((line.removeprefix("Explanation:").strip() for line in lines if line.startswith("Expl")), "")
    return _without_folders(f"{heading}. {explained}" if explained else f"{heading}.")


def _short(file: str) -> str:
    path = Path(file)
    if (shorter := _without_folders(file)) != file:
        return shorter
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file


def _without_folders(text: str) -> str:
    return re.sub(r"[^\s\"'(]*/(?:site|dist)-packages/", "", text)


def _merged(stops: list[GraphBreak]) -> tuple[GraphBreak, ...]:
    """One for each line of source code, in the order of their first capture; the first reason stands for all."""
    merged: dict[tuple[str, int], GraphBreak] = {}
    for stop in stops:
        key = (stop.file, stop.line)
        merged[key] = replace(merged[key], count=merged[key].count + 1) if key in merged else stop
    return tuple(merged.values())
