"""A `MatchReport` as a page: one HTML file that needs nothing else, in light and dark, for wide and narrow windows."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

import omnifx
from omnifx import diagram
from omnifx.report import MatchReport, bytes_text, tokens_text


def page_of(report: MatchReport) -> str:
    """The page, as text. Whatever comes from the model is escaped."""
    kinds = Counter(branch.kind for branch in report.branches)
    return template("page.html.j2").render(
        report=report,
        version=omnifx.__version__,
        picture=diagram.picture_of(report),
        patterns=diagram.patterns_of(report.branches),
        refused=diagram.patterns_of([branch for branch in report.branches if not branch.cacheable]),
        kinds=[(kind, diagram.label_of(kind), count) for kind, count in kinds.items()],
        tokens_text=tokens_text,
        whole=report.token_reasons(by="name"),
        share=lambda flops: flops / report.flops if report.flops else 0.0,
        inside=sum(branch.flops for branch in report.branches) / report.flops if report.flops else 0.0,
        left=report.reuse_flops / report.flops if report.flops else 1.0,
        label_of=diagram.label_of,
        css=_css,
        clip=_clip,
        breakable=lambda name: re.findall(r"[^._/]*[._/]?", name),
        WIDTH=diagram.WIDTH,
        HEADER=diagram.HEADER,
    )


def flops_text(flops: float) -> str:
    """FLOPs in the largest unit that leaves at least 1."""
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6), ("kFLOP", 1e3)):
        if flops >= size:
            return f"{flops / size:,.1f} {unit}"
    return f"{flops:,.0f} FLOP"


def percent_text(share: float) -> str:
    """A share in percent, with the digits that tell it from 0 and from 1."""
    if 0 < share < 0.0001:
        return "< 0.01%"
    if 0.9999 < share < 1:
        return "> 99.99%"
    return f"{share:.2%}" if share < 0.1 or share > 0.9995 else f"{share:.1%}"


@cache
def template(name: str) -> Template:
    """A page's template. It escapes all that it is given."""
    environment = Environment(
        loader=PackageLoader("omnifx", "."),
        autoescape=True,  # by default only files whose name ends in .html are
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"bytes": bytes_text, "flops": flops_text, "percent": percent_text}
    return environment.get_template(name)


def _css(kind: str) -> str:
    """A class name for a kind; what is not known has a look of its own."""
    return kind.replace("+", "_") if kind in diagram.LABELS else "other"


def _clip(name: str, room: float) -> str:
    """A name that fits into so many pixels of 12px monospace: its end says more than its beginning."""
    length = int(room / 7.25)
    return name if len(name) <= length else f"…{name[1 - length :]}"
