"""Recordings: inner products survive, bytes are bounded, and what cannot be planned from is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from omnifx.clock import Reading, Watched
from omnifx.graph import Inputs
from omnifx.recording import MOST_CALLS, Recorder, Recording
from tests.toys import noise

INPUTS = Inputs(latents=0, small=(1, 2), large=(3,), static=(), names=("x", "t", "y", "text"))
TEXT = torch.zeros(4)


def reading(time: float, x: float, *, label: float = 3.0, text: Any = TEXT, finite: bool = True) -> Reading:
    """A call whose latents are all `x`."""
    return Reading(
        small=((time,), (label,)),
        large=(Watched.of(text),),
        sample=(x,) * 8,
        finite=finite,
        shapes=((1,), (1,), (4,), (1, 8)),
    )


def recording_of(*readings: Reading) -> Recording:
    recording = Recording(INPUTS)
    recorder = Recorder(torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4), budget=2**30, frame_axis=None)
    for k, entry in enumerate(readings):
        recording.add(entry, recorder, recorder.keep(noise(1, 4, 4, 4, seed=k), noise(1, 4, 4, 4, seed=50 + k), None))
    return recording


def steps(count: int = 6, **changes: Any) -> list[Reading]:
    return [reading(1000.0 - 100 * k, 1.0 + 0.1 * k, **changes) for k in range(count)]


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_whole_vectors_keep_their_inner_products() -> None:
    recorder = Recorder(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), budget=2**30, frame_axis=None)
    x, o, q = (noise(1, 4, 8, 8, seed=seed) for seed in range(3))

    grams = recorder.grams(recorder.keep(x, o, q))

    flat = torch.stack([x, o, q]).reshape(3, -1)
    assert not recorder.sketched
    assert torch.allclose(grams.sum((0, 1)), flat @ flat.T, rtol=1e-4, atol=1e-3)


def test_a_sketch_keeps_inner_products_nearly_and_its_budget() -> None:
    shape = (1, 4, 64, 64)
    budget = MOST_CALLS * 3 * 4 * 8 * 512
    recorder = Recorder(torch.zeros(shape), torch.zeros(shape), budget=budget, frame_axis=None)
    x = noise(*shape)
    o = 0.8 * x + 0.6 * noise(*shape, seed=1)

    kept = recorder.keep(x, o, None)
    grams = recorder.grams(kept).sum((0, 1))

    assert recorder.sketched
    assert kept.numel() * 4 == recorder.bytes_per_call
    assert recorder.bytes_per_call * MOST_CALLS <= budget
    true = torch.stack([x, o]).reshape(2, -1)
    norm = float(true[0] @ true[0])
    assert torch.allclose(grams[:2, :2], true @ true.T, atol=0.06 * norm)
    assert torch.equal(grams[2], torch.zeros(3))


def test_outputs_with_more_channels_are_cropped_to_the_latents() -> None:
    recorder = Recorder(torch.zeros(1, 4, 8, 8), torch.zeros(1, 8, 8, 8), budget=2**30, frame_axis=None)
    x, o = noise(1, 4, 8, 8), noise(1, 8, 8, 8, seed=1)

    kept = recorder.keep(x, o, o * 2)

    assert torch.equal(kept, torch.stack([x.flatten(), o[:, :4].flatten(), 2 * o[:, :4].flatten()]))


def test_no_more_calls_are_kept_than_fit() -> None:
    recording = recording_of(*(reading(1000.0 - k, 1.0 + k) for k in range(MOST_CALLS + 5)))

    assert recording.num_bytes == MOST_CALLS * 3 * 4 * 64
    assert recording.problem() == f"the generation has more than {MOST_CALLS} calls"


# -- streams and roles -------------------------------------------------------------------------------------------------


def test_calls_with_equal_latents_and_timestep_are_streams_of_one_step() -> None:
    calls = [reading(1000.0 - 100 * k, 1.0 + 0.1 * k, label=label) for k in range(5) for label in (3.0, 0.0)]

    recording = recording_of(*calls)

    assert (recording.num_steps, [len(group) for group in recording.groups]) == (5, [2] * 5)
    assert recording.time_inputs() == (0,)
    assert recording.problem() == ""
    assert recording.stream_of(reading(600.0, 1.4)) == 2
    assert recording.stream_of(reading(500.0, 1.5)) == 0


def test_large_inputs_that_change_at_every_step_vary_and_one_overwritten_once_does_not() -> None:
    texts = [torch.full((4,), float(k)) for k in range(6)]
    each = [reading(1000.0 - k, 1.0 + 0.1 * k, text=texts[k]) for k in range(6)]
    once = [reading(1000.0 - k, 1.0 + 0.1 * k, text=texts[k >= 3]) for k in range(6)]

    assert recording_of(*each).varying_inputs() == (0,)
    assert recording_of(*once).varying_inputs() == ()
    assert recording_of(*steps()).varying_inputs() == ()


def test_a_timestep_that_is_back_starts_a_new_generation() -> None:
    recording = recording_of(*steps(4))

    assert recording.starts_anew(reading(1000.0, 9.0))  # back at the first one
    assert recording.starts_anew(reading(950.0, 9.0))  # runs the other way
    assert not recording.starts_anew(reading(600.0, 1.4))
    assert not recording.starts_anew(reading(700.0, 1.3, label=0.0))  # another stream of the last step


# -- problems ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calls", "problem"),
    [
        (steps(3), "it saw 3 steps, and at least 4 are needed"),
        ([*steps(5), reading(600.0, 1.4, label=0.0)], "the number of calls with the same latents differs"),
        ([reading(5.0, 1.0 + 0.1 * k) for k in range(6)], "no small input changes from step to step"),
        ([*steps(5), reading(500.0, 1.5, finite=False)], "latents held NaN or infinity"),
        (
            [
                call
                for k in range(6)
                for call in (reading(1000.0 - k, 1.0 + 0.01 * k), reading(1000.0 - k, -1.0 + 0.01 * k))
            ],
            "two generations seem to have been mixed",
        ),
        (steps(6), ""),
    ],
    ids=["short", "streams", "no_time", "nan", "mixed", "fine"],
)
def test_what_cannot_be_planned_from_is_found(calls: list[Reading], problem: str) -> None:
    found = recording_of(*calls).problem()

    assert problem in found
    assert bool(found) == bool(problem)


def test_the_timeline_holds_timesteps_and_moves() -> None:
    timeline = recording_of(*steps(5)).timeline()

    assert timeline.timesteps == (1000.0, 900.0, 800.0, 700.0, 600.0)
    assert timeline.moves == pytest.approx((0.0, 0.1, 0.1 / 1.1, 0.1 / 1.2, 0.1 / 1.3))
    assert (timeline.time_inputs, timeline.varying_inputs) == ((0,), ())
