"""Pages in Markdown that show measured figures: the parts between two marks belong to commands."""

from __future__ import annotations

from collections.abc import Sequence

END = "<!-- end of what was measured -->"


def start_of(command: str) -> str:
    """The mark that begins what a command writes."""
    return f"<!-- measured: {command} -->"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table. Cells are written as they are: see `plain`."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(text: str) -> str:
    """A text that may be anything, as words on one line of a page."""
    for sign in "\\`*_[]|#":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())


def with_block(page: str, block: str, command: str) -> str:
    """A page with what `command` writes replaced, or added at its end; without a block, as it is."""
    if not block:
        return page
    start = start_of(command)
    own = f"{start}\n{block}\n{END}\n"
    if start not in page:
        return f"{page.rstrip()}\n\n{own}"
    before, rest = page.split(start, 1)
    return f"{before}{own}{rest.split(END, 1)[1].removeprefix(chr(10))}"
