import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from omnifx.breaks import GraphBreak
from omnifx.cli import folded
from omnifx.diagram import blocks_of, picture_of, runs_of
from omnifx.errors import ConfigError
from omnifx.explainer import explain
from omnifx.graph import Branch, Tokens
from omnifx.report import MatchReport
from tests.toys import TINY, toy, toy_inputs


def branch(
    name: str, kind: str = "mlp", *, flops: int = 100, trunks: tuple[int, ...] = (0,), reason: str = ""
) -> Branch:
    """A branch as `FindBranches` would describe it."""
    return Branch(
        name=name,
        kind=kind,
        dependence="latent",
        module_path=name,
        adds=("add",) * len(trunks),
        heavy=("mm",),
        cuts=("mm",),
        flops=flops,
        cache_bytes=2048,
        cacheable=not reason,
        reason=reason,
        trunks=trunks,
    )


def report(*branches: Branch, **others: object) -> MatchReport:
    """A report of these branches, all of the model's FLOPs being theirs."""
    total = sum(b.flops for b in branches)
    given: dict[str, object] = {"model": "Toy", "flops": total, "reuse_flops": 0, "cache_bytes": 4096, "graphs": 1}
    return MatchReport(branches=branches, **(given | others))  # type: ignore[arg-type]


def flux_like(double: int = 19, single: int = 38) -> MatchReport:
    """A report with the blocks of FLUX."""
    found = []
    for i in range(double):
        path = f"transformer_blocks.{i}"
        found += [branch(f"{path}.attn", "joint_attention", trunks=(0, 1)), branch(f"{path}.ff")]
        found += [branch(f"{path}.ff_context", trunks=(1,))]
    found += [branch(f"single_transformer_blocks.{i}", "parallel") for i in range(single)]
    return report(*found, inputs={"hidden_states": "latents"}, samples=1)


class Elements(HTMLParser):
    """Tags with attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def drawn(self) -> list[str]:
        """Names of the branches in the picture; those that stand for a folded run are left out."""
        classes = [(a, (a.get("class") or "").split()) for tag, a in self.tags if tag == "g"]
        return [str(a["data-branch"]) for a, names in classes if "branch" in names and "all" not in names]


# -- folding -----------------------------------------------------------------------------------------------------------


def test_equal_blocks_in_a_row_are_folded_and_each_is_there_to_be_unfolded():
    found = flux_like()

    picture = picture_of(found)

    assert [(len(g.shown), len(g.folded), g.shown[0].times) for g in picture.groups] == [(1, 19, 19), (1, 38, 38)]
    assert picture.groups[0].shown[0].title == "transformer_blocks.0–18"
    assert Elements(found.to_html()).drawn() == [b.name for b in found.branches]


def test_blocks_that_take_turns_are_folded_together():
    names = [f"{kind}.{i}.attn" for i in range(5) for kind in ("blocks", "temporal_blocks")]

    runs = runs_of(blocks_of([branch(name, "self_attention") for name in names]))

    assert [(run.period, run.count) for run in runs] == [(2, 5)]


def test_a_block_that_differs_is_drawn_by_itself():
    same = [branch(f"blocks.{i}.ff") for i in range(3)]
    runs = runs_of(blocks_of([*same, branch("blocks.3.ff", flops=7), branch("proj_out", reason="too small")]))

    assert [run.count for run in runs] == [3, 1, 1]


def test_a_trunk_that_is_no_longer_used_joins_the_latents():
    picture = picture_of(flux_like(2, 2))

    double, single = (group.shown[0] for group in picture.groups)
    assert (len(double.lines), double.ending) == (2, ())
    assert (len(single.lines), single.ending) == (1, (picture.trunks[1],))
    assert [len(box.trunks) for box in double.boxes] == [2, 1, 1]


# -- the page ----------------------------------------------------------------------------------------------------------


def test_a_page_needs_nothing_from_elsewhere():
    page = Elements(flux_like().to_html())

    assert not [(tag, a) for tag, a in page.tags if tag in ("img", "iframe") or "src" in a]
    assert [a["href"] for tag, a in page.tags if tag == "link"] == ["data:,"]
    assert "http" not in page.text
    assert "url(" not in page.text


def test_headings_and_tables_have_their_headers():
    page = Elements(flux_like().to_html())

    headings = [tag for tag, _ in page.tags if tag in ("h1", "h2", "h3")]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1
    assert all(a.get("scope") in ("col", "row") for tag, a in page.tags if tag == "th")
    assert all(a.get("aria-label") for tag, a in page.tags if tag == "svg")
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert sorted(set(ids)) == sorted(ids)
    assert {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a} <= set(ids)


EVIL = "<script>alert('x')</script>&\"'"


def test_whatever_comes_from_a_model_is_escaped():
    stop = GraphBreak(reason=EVIL, file=EVIL, line=3, source=EVIL)
    bad = replace(branch(f"blocks.0.{EVIL}", EVIL, reason=EVIL), module_path=EVIL)
    whole = replace(branch(f"blocks.0.{EVIL}.2", EVIL), module_path=EVIL, token_reason=EVIL)
    found = report(bad, whole, model=EVIL, inputs={EVIL: EVIL}, notes=(EVIL,), breaks=(stop,), graphs=2)
    found = replace(found, avoided=(stop,), kept_whole={EVIL: EVIL})

    page = found.to_html()

    shown = Elements(page)
    assert "<script>alert" not in page
    assert [tag for tag, _ in shown.tags].count("script") == 1  # our own, which sorts tables
    assert shown.text.count(EVIL) >= 8
    assert shown.drawn() == [f"blocks.0.{EVIL}", f"blocks.0.{EVIL}.2"]


def test_refused_branches_and_breaks_are_told_with_their_reasons():
    stop = GraphBreak(reason="Dynamic shape operator.", file="pkg/moe.py", line=7, source="x.bincount()", count=3)
    found = report(branch("blocks.0.ff"), branch("emb", reason="changes with the step"), breaks=(stop,), graphs=4)

    page = Elements(found.to_html())

    assert "changes with the step" in page.text
    assert "pkg/moe.py:7" in page.text
    assert "3 captures stopped here" in page.text
    assert "falls apart into 4 graphs" in page.text


def with_tokens(found: Branch, number: int) -> Branch:
    """A branch that may be computed token by token."""
    tokens = Tokens(batch=1, number=number, flops=found.flops, spared_flops=0)
    return replace(found, tokens=tokens)


def test_tables_say_which_branches_work_token_by_token_and_why_others_do_not():
    reasons = ["bmm_3 needs every token of view_73", "bmm_17 needs every token of view_91"]
    attentions = [replace(branch(f"blocks.{i}.attn", "self_attention"), token_reason=reasons[i % 2]) for i in range(4)]
    mlps = [with_tokens(branch(f"blocks.{i}.ff"), 4096) for i in range(4)]
    refused = replace(branch("emb", reason="too small"), token_reason="it is not cached")
    found = report(*attentions, *mlps, refused)

    page, table = Elements(found.to_html()), str(found).splitlines()

    assert table[1].split()[-1] == "tokens"
    assert {line.split()[0]: line.split()[-1] for line in table[2:10]} == {
        **{f"blocks.{i}.attn": "-" for i in range(4)},
        **{f"blocks.{i}.ff": "4,096" for i in range(4)},
    }
    told = [line for line in table if line.startswith("not token by token")]
    assert told == [f"not token by token: self_attention (4): {reasons[0]}"]
    assert folded(found).count("4,096") == 1
    assert [line for line in folded(found).splitlines() if line.startswith("not token")] == told
    assert "".join(page.text.split()).count("blocks.*.attn4" + reasons[0].replace(" ", "")) == 1
    assert page.text.count("4,096") == 1 + 4 + 4 + 1  # patterns, every branch, and the picture's boxes and fold
    assert "it is not cached" not in page.text.split("Token by token")[1].split("Refused")[0]


def test_modules_that_are_kept_whole_are_told_with_the_breaks_in_them():
    stop = GraphBreak(reason="Dynamic shape operator.", file="pkg/moe.py", line=7, source="x.bincount()")
    kept = {f"blocks.{i}.ff": "Experts" for i in range(3)}
    found = report(branch("blocks.0.ff"), kept_whole=kept, avoided=(stop,))

    page = Elements(found.to_html())

    assert "None: the whole step is one graph." in page.text
    assert "x.bincount()" in page.text
    assert " ".join(page.text.split()).count("blocks.*.ff Experts 3") == 1 or "blocks.*.ffExperts3" in page.text
    assert "kept whole, as one operator each: blocks.*.ff (3 Experts)" in str(found)


def test_a_page_is_small_even_for_many_blocks():
    assert len(flux_like().to_html().encode()) < 400_000


def test_a_report_without_branches_is_still_a_page():
    assert "0 of 0 branches" in Elements(report().to_html()).text


def test_a_page_that_cannot_be_written_is_refused(tmp_path):
    assert flux_like(1, 1).save_html(tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(ConfigError, match=r"could not be written: Is a directory\. Name a file"):
        flux_like(1, 1).save_html(tmp_path)


# -- what a report holds -----------------------------------------------------------------------------------------------


def test_joint_attention_stands_between_two_trunks():
    tiny = TINY["flux"]()

    found = explain(tiny.model, **tiny.inputs)

    trunks = {b.name: b.trunks for b in found.branches}
    assert trunks["transformer_blocks.0.attn"] == (0, 1)
    assert trunks["transformer_blocks.0.ff"] == (0,)
    assert trunks["transformer_blocks.0.ff_context"] == (1,)
    assert trunks["single_transformer_blocks.0"] == (0,)


class Projected(nn.Module):
    """Two toys with a projection of the trunk in between, as skip connections have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.between, self.second = toy(1), nn.Conv2d(4, 4, 1), toy(1)

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self.first(x, *others)), *others)


def test_the_latents_trunk_goes_on_behind_a_projection():
    found = explain(Projected(), *toy_inputs())

    assert {b.trunks for b in found.branches} == {(0,)}
    assert {b.name.split(".")[0] for b in found.branches} == {"first", "second"}


class Counting(nn.Module):
    """Two toys with a look at a value in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = toy(1), toy(1)

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        y = self.first(x, *others)
        if y.sum() > 1e9:
            return y
        return self.second(x + y, *others)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_graph_breaks_are_found_with_their_source(device):
    model, inputs = Counting().to(device), [t.to(device) for t in toy_inputs()]

    found = explain(model, *inputs)

    (stop,) = found.breaks
    assert stop.file.endswith("tests/test_page.py")
    assert stop.source == "if y.sum() > 1e9:"
    assert "Data-dependent branching" in stop.reason
    assert found.graphs == 2
    assert {b.name.split(".")[0] for b in found.branches} == {"first", "second"}
    assert f"graph break at {stop.place}: Data-dep" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["breaks"][0]["line"] == stop.line


def test_equal_modules_of_a_broken_model_are_told_apart():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(toy(1) for _ in range(3))

        def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x, *others)
                torch._dynamo.graph_break()
            return x

    found = explain(Broken(), *toy_inputs())

    names = [b.name for b in found.branches]
    assert len(set(names)) == len(names)
    assert {name.rsplit(".blocks", 1)[0] for name in names} == {"blocks.0", "blocks.1", "blocks.2"}
    assert found.entries == 3
    assert found.flops == 3 * explain(toy(1), *toy_inputs()).flops
