"""Profiles: inner products as they were measured, costs, and files that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from omnifx.errors import ProfileError
from omnifx.plan import COMPUTE, PREDICT, REUSE
from omnifx.profile import NUM_BANDS, NUM_HALVES, Profile
from tests.profiles import make_profile


def rewritten(profile: Profile, path: Path, *, tensors: dict[str, Any] | None = None, **changes: Any) -> Path:
    """The profile's file, with some fields of its header, or its tensors, changed."""
    profile.save(path)
    header = json.loads(profile.meta.model_dump_json()) | changes
    save_file(load_file(path) | {} if tensors is None else tensors, str(path), metadata={"omnifx": json.dumps(header)})
    return path


@given(steps=st.integers(1, 8), runs=st.integers(1, 3), streams=st.integers(1, 2), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_grams_are_the_inner_products_of_the_vectors(steps: int, runs: int, streams: int, seed: int) -> None:
    size = (runs, streams, steps, NUM_HALVES, NUM_BANDS, 5)
    q = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    profile = make_profile(steps, q=q, runs=runs, streams=streams, seed=seed)

    whole = profile.gram("q", "q")
    assert whole.shape == (runs, streams, NUM_BANDS, steps, steps)
    assert whole.dtype == torch.float64
    flat = q.flatten(3)
    torch.testing.assert_close(whole.sum(2), flat @ flat.mT, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(profile.gram("q", "q", half=0) + profile.gram("q", "q", half=1), whole)
    torch.testing.assert_close(profile.gram("x", "q"), profile.gram("q", "x").mT)
    torch.testing.assert_close(profile.gram("x", "o", run=0), profile.gram("x", "o")[0])


def test_cost_of_a_row_is_what_its_reuses_leave() -> None:
    meta = make_profile(2, branch_flops=(50, 30), flops=100).meta

    assert meta.cost_of((COMPUTE, COMPUTE)) == 1.0
    assert meta.cost_of((REUSE, COMPUTE)) == pytest.approx(0.5)
    assert meta.cost_of((REUSE, REUSE)) == pytest.approx(0.2)
    counted = meta.model_copy(update={"reuse_flops": 5})  # less, where the branches' leave nothing to read
    assert counted.cost_of((REUSE, REUSE)) == counted.cost_of((PREDICT, PREDICT)) == pytest.approx(0.05)
    assert counted.cost_of((REUSE, COMPUTE)) == pytest.approx(0.5)


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    profile = make_profile(6, runs=2, streams=2)

    profile.save(tmp_path / "model.profile")
    loaded = Profile.load(tmp_path / "model.profile")

    assert loaded.meta == profile.meta
    assert torch.equal(loaded.grams, profile.grams)
    assert torch.equal(loaded.moves, profile.moves)
    assert loaded.summary()["model"] == "Toy"


@pytest.mark.parametrize("shape", [(1, 1, 2, 4, 3, 3), (1, 1, 2, 4, 12, 9), (2, 1, 2, 4, 12, 12)])
def test_grams_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    profile = make_profile(4)
    with pytest.raises(ProfileError, match=r"grams have shape .*, expected \(1, 1, 2, 4, 12, 12\)"):
        Profile(meta=profile.meta, grams=torch.zeros(shape), moves=profile.moves)


def test_moves_of_another_shape_and_values_that_are_not_finite_are_refused() -> None:
    profile = make_profile(4)
    with pytest.raises(ProfileError, match="moves have shape"):
        Profile(meta=profile.meta, grams=profile.grams, moves=torch.zeros(4))
    with pytest.raises(ProfileError, match="NaN or infinity"):
        Profile(meta=profile.meta, grams=profile.grams * torch.nan, moves=profile.moves)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 2}, "format 2 is not known; this omnifx reads format 1"),
        ({"timesteps": []}, "at least one timestep"),
        ({"num_runs": 0}, "num_runs"),
        ({"branches": [{"name": "a"}]}, "branches.0"),
        ({"surprise": 1}, "surprise"),
        ({"timesteps": [1.0]}, "grams have shape"),
    ],
)
def test_a_profile_file_that_breaks_a_rule_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path = rewritten(make_profile(4), tmp_path / "model.profile", **changes)
    with pytest.raises(ProfileError, match=says):
        Profile.load(path)


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, str(tmp_path / "weights.safetensors"))
    with pytest.raises(ProfileError, match=r"is not a profile \(no omnifx header\)\. Measure it anew"):
        Profile.load(tmp_path / "weights.safetensors")


def test_a_profile_with_other_tensors_is_refused(tmp_path: Path) -> None:
    path = rewritten(make_profile(4), tmp_path / "model.profile", tensors={"weight": torch.zeros(3)})
    with pytest.raises(ProfileError, match=r"holds \['weight'\], expected grams and moves"):
        Profile.load(path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00" * 64, b"\xff" * 64, b"not a profile at all"])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.profile"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match=r"is corrupt|is not a profile"):
        Profile.load(path)


@given(keep=st.floats(0.0, 0.999))
@settings(max_examples=30, deadline=None)
def test_a_truncated_profile_file_is_refused(tmp_path_factory: pytest.TempPathFactory, keep: float) -> None:
    path = tmp_path_factory.mktemp("profile") / "model.profile"
    make_profile(3).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ProfileError, match="is corrupt"):
        Profile.load(path)


def test_a_missing_profile_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"cannot read .*nowhere\.profile.* Measure it anew with `omnifx calibrate`"):
        Profile.load(tmp_path / "nowhere.profile")
