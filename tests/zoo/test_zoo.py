"""Any diffusion transformer: the branches of every class in diffusers are found, and reusing them is exact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.zoo import __main__ as command
from tests.zoo.examine import Found, examined
from tests.zoo.models import LEFT_OUT, ZOO, transformer_classes
from tests.zoo.table import PATH, PINNED, pinned_cells, pinned_in, reasons_in, remarks, row_of, rows_in

QUICK = (
    "AuraFlowTransformer2DModel",  # a feed-forward around an inner residual
    "CogView4Transformer2DModel",  # a module called twice in a step
    "Cosmos3OmniTransformer",  # two attentions that share keys and values
    "LTX2VideoTransformer3DModel",  # sound and pictures
    "StableAudioDiTModel",  # convolutions that are left alone
)


@pytest.fixture(
    scope="module", params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ZOO]
)
def model(request: pytest.FixtureRequest) -> tuple[str, Found]:
    """A model's name, and what was found in it."""
    (found,) = examined([request.param])
    return request.param, found


def test_the_branches_are_those_that_are_pinned(model: tuple[str, Found]) -> None:
    name, found = model

    assert found.unlike(ZOO[name]) == []


def test_a_step_that_reuses_everything_is_the_model_with_its_modules_old_outputs(model: tuple[str, Found]) -> None:
    name, found = model

    assert found.inexact(ZOO[name]) == []


def test_a_generation_is_planned_and_followed(model: tuple[str, Found], request: pytest.FixtureRequest) -> None:
    name, found = model
    if ZOO[name].in_full:
        request.applymarker(pytest.mark.xfail(reason=ZOO[name].in_full, strict=True))

    assert found.not_followed(ZOO[name]) == []


# -- the table ---------------------------------------------------------------------------------------------------------


def test_every_transformer_of_diffusers_is_in_the_zoo_or_left_out_with_a_reason() -> None:
    named = {entry.cls for entry in ZOO.values()}

    assert sorted(named | set(LEFT_OUT)) == transformer_classes()
    assert not named & set(LEFT_OUT)
    assert all(LEFT_OUT.values())


def test_the_document_says_what_is_pinned() -> None:
    rows = rows_in(PATH.read_text(encoding="utf-8"))

    assert list(rows) == list(ZOO)
    for name, entry in ZOO.items():
        assert pinned_in(rows[name]) == (*pinned_cells(entry), remarks(entry))


def test_the_document_holds_no_row_that_is_wrong() -> None:
    for name, row in rows_in(PATH.read_text(encoding="utf-8")).items():
        replay, reference, generation, recompilations = row[len(PINNED) : -1]
        assert (replay, recompilations) == ("0", "0"), name
        assert float(reference) <= 1e-5, name
        assert generation == "in full" if ZOO[name].in_full else float(generation) <= 1e-5, name


def test_the_document_lists_what_is_left_out() -> None:
    assert reasons_in(PATH.read_text(encoding="utf-8")) == LEFT_OUT


def test_what_is_left_alone_is_explained() -> None:
    unexplained = [name for name, entry in ZOO.items() if (entry.left_alone or entry.graphs > 1) and not remarks(entry)]

    assert unexplained == []


# -- the command -------------------------------------------------------------------------------------------------------

DIT = "DiTTransformer2DModel"


@pytest.fixture(scope="module")
def dit() -> Found:
    """What is found in DiT."""
    (found,) = examined([DIT])
    return found


@pytest.fixture
def asked(dit: Found, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that the command examines; each of them is taken for DiT."""
    names: list[str] = []

    def examined_as_dit(given: Sequence[str], *, jobs: int) -> Iterator[Found]:
        names.extend(given)
        return iter([dit] * len(given))

    monkeypatch.setattr(command, "examined", examined_as_dit)
    return names


def test_the_command_writes_its_rows(asked: list[str], dit: Found, tmp_path: Path) -> None:
    out = tmp_path / "models.md"

    status = command.main(["--models", DIT, "--out", str(out), "--check"])

    assert (status, asked) == (0, [DIT])
    assert rows_in(out.read_text(encoding="utf-8")) == {DIT: row_of(ZOO[DIT], dit)}


def test_the_command_keeps_the_rows_of_other_models(asked: list[str], tmp_path: Path) -> None:
    out = tmp_path / "models.md"
    out.write_text(PATH.read_text(encoding="utf-8"), encoding="utf-8")

    command.main(["--models", DIT, "--out", str(out)])

    assert list(rows_in(out.read_text(encoding="utf-8"))) == list(ZOO)


def test_the_command_fails_where_a_row_is_wrong(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--models", "PixArtTransformer2DModel"]) == 1
    assert "PixArtTransformer2DModel: branches is '2 mlp, 2 self_attention', pinned is" in capsys.readouterr().err


def test_the_command_fails_where_the_document_is_stale(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stale = tmp_path / "models.md"
    stale.write_text(PATH.read_text(encoding="utf-8").replace(f"| `{DIT}` | 1 |", f"| `{DIT}` | 2 |"), encoding="utf-8")
    monkeypatch.setattr(command, "PATH", stale)

    assert command.main(["--models", DIT, "--check"]) == 1
    assert command.main(["--models", DIT]) == 0


@pytest.mark.parametrize(("shard", "first"), [("1/3", 0), ("2/3", 1), ("3/3", 2)])
def test_shards_take_turns(asked: list[str], shard: str, first: int) -> None:
    command.main(["--shard", shard])

    assert asked == list(ZOO)[first::3]


@pytest.mark.parametrize("shard", ["0/2", "3/2", "x", "1/"])
def test_a_shard_that_does_not_exist_is_refused(shard: str) -> None:
    with pytest.raises(SystemExit):
        command.main(["--shard", shard])


def test_a_model_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--models", "NoSuchTransformer"]) == 2
    assert "no models ['NoSuchTransformer']; known are DiTTransformer2DModel" in capsys.readouterr().err
