"""A recording: the latents, outputs and cache-induced noise of one full generation, as a profile needs them.

Vectors are kept whole while they are small, else as a fixed random sketch (count sketch: random signs added up into
buckets, which keeps inner products in expectation, with a relative error of about 1/sqrt(buckets)). Either way the
bytes are bounded by `record_budget`, for up to `MOST_CALLS` calls; a longer generation is not recorded further.
"""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from omnifx.changes import Changes
from omnifx.clock import Reading, Timeline
from omnifx.grid import Grid, part_index
from omnifx.path import path_of
from omnifx.prior import PriorSums
from omnifx.profile import NUM_BANDS, NUM_HALVES, BlockMeta, BranchMeta, Profile, ProfileMeta, SpanMeta
from omnifx.quality import Timing

if TYPE_CHECKING:
    from omnifx.graph import Inputs

MOST_CALLS = 512
FEWEST_STEPS = 4
_PARTS = NUM_HALVES * NUM_BANDS


@dataclass
class _Call:
    reading: Reading
    vectors: Tensor  # [3, numel] (x, o, q) or [3, _PARTS * buckets]
    changes: Changes | None = None


class Recorder:
    """Turns the tensors of a call into what a recording keeps; one for each shape of latents and output.

    The grid is that of what latents and output have in common: outputs with more channels (a predicted variance) or
    latents with more (an image to condition on) are cropped to the first ones.
    """

    def __init__(self, latents: Tensor, output: Tensor, *, budget: int, frame_axis: int | None) -> None:
        common = latents.dim() == output.dim()
        shape = tuple(map(min, latents.shape, output.shape)) if common else tuple(output.shape)
        self.comparable = common
        self.output_shape = tuple(output.shape)
        self.window = tuple(slice(0, size) for size in shape)
        self.grid = Grid.of(shape, frame_axis=frame_axis)
        self.numel = math.prod(shape)
        self.buckets = 0
        self.blocks = 0
        self._signs: Tensor | None = None
        self._index: Tensor | None = None
        if self.numel * 3 * 4 * MOST_CALLS > budget:
            self.buckets = max(64, budget // (MOST_CALLS * 3 * 4 * _PARTS))
            self.blocks = 2 if shape[0] % 2 == 0 else 1
            self.buckets -= self.buckets % self.blocks
            size, own = self.numel // self.blocks, self.buckets // self.blocks
            generator = torch.Generator().manual_seed(0)
            bucket = torch.randint(own, (size,), generator=generator)
            parts = part_index(self._grid_of(self.blocks)) * self.buckets + bucket
            starts = own * torch.arange(self.blocks)  # each half of the batch has buckets of its own, hashed alike
            self._index = (parts + starts[:, None]).reshape(-1).to(output.device)
            signs = torch.randint(2, (size,), generator=generator, dtype=torch.int8) * 2 - 1
            self._signs = signs.repeat(self.blocks).to(output.device)

    @property
    def sketched(self) -> bool:
        """Whether vectors are sketched rather than kept whole."""
        return self.buckets > 0

    @property
    def bytes_per_call(self) -> int:
        """Bytes that one call adds to a recording."""
        return 3 * 4 * (self.buckets * _PARTS if self.sketched else self.numel)

    def keep(self, latents: Tensor, output: Tensor, noise: Tensor | None) -> Tensor:
        """[3, n], float32: latents, output, noise (zeros if unknown), whole or sketched."""
        crop = output[self.window]
        x = latents[self.window] if self.comparable else torch.zeros_like(crop)
        q = torch.zeros_like(crop) if noise is None else noise[self.window]
        whole = torch.stack([x.float().reshape(-1), crop.float().reshape(-1), q.float().reshape(-1)])
        if self._index is None or self._signs is None:
            return whole
        spectrum = self.grid.spectrum(whole.reshape(3, *self.grid.shape)) * self._signs
        return spectrum.new_zeros(3, _PARTS * self.buckets).index_add_(1, self._index, spectrum)

    def grams(self, vectors: Tensor) -> Tensor:
        """Inner products of [n, ...] kept vectors: [NUM_HALVES, NUM_BANDS, n, n], float32."""
        count = vectors.shape[0]
        if self.sketched:
            parts = vectors.reshape(count, _PARTS, self.buckets).transpose(0, 1).double()
            grams = parts @ parts.transpose(1, 2)
        else:
            spectrum = self.grid.spectrum(vectors.reshape(count, *self.grid.shape))
            where = part_index(self.grid).to(vectors.device)
            grams = torch.stack([(part := spectrum[:, where == p].double()) @ part.T for p in range(_PARTS)])
        return grams.reshape(NUM_HALVES, NUM_BANDS, count, count).float().cpu()

    def split(self, vectors: Tensor, blocks: int) -> Tensor:
        """[3, n] of one call -> [blocks, 3, n / blocks], one for each of so many equal parts of the batch.

        A sketch knows `self.blocks` of them.
        """
        if not self.sketched:
            return vectors.reshape(3, blocks, -1).transpose(0, 1)
        parted = vectors.reshape(3, _PARTS, self.blocks, -1)
        return parted.movedim(2, 0).reshape(self.blocks, 3, -1)

    def half_grams(self, vectors: Tensor, blocks: int) -> Tensor:
        """Inner products of [n, m] vectors that `split` gave: [NUM_HALVES, n, n], float64, on the host."""
        count = vectors.shape[0]
        if self.sketched:
            halves = vectors.reshape(count, NUM_HALVES, -1).transpose(0, 1).double()
            return (halves @ halves.transpose(1, 2)).cpu()
        grid = self._grid_of(blocks)
        spectrum = grid.spectrum(vectors.reshape(count, *grid.shape))
        half = part_index(grid).to(vectors.device) // NUM_BANDS
        return torch.stack([(some := spectrum[:, half == h].double()) @ some.T for h in range(NUM_HALVES)]).cpu()

    def _grid_of(self, blocks: int) -> Grid:
        shape = (self.grid.shape[0] // blocks, *self.grid.shape[1:])
        return Grid(shape, self.grid.axes)


class Recording:
    """The calls of one generation, all run in full, in the order they came."""

    def __init__(self, inputs: Inputs) -> None:
        self.recorder: Recorder | None = None  # known from the first call on
        self.inputs = inputs
        self.groups: list[list[_Call]] = []  # calls with the same latents: the streams of one step
        self.full = False
        self.prior: PriorSums | None = None  # only for policies that need a prior
        self.times_ms: list[tuple[float, float]] = []  # of each call of a model that is one graph: graph, overhead

    @property
    def num_steps(self) -> int:
        """Steps seen so far."""
        return len(self.groups)

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(len(group) for group in self.groups) * self.recorder.bytes_per_call if self.recorder else 0

    def stream_of(self, reading: Reading) -> int:
        """Which stream of its step a call would be, by order: calls with equal latents belong to one step."""
        return len(self.groups[-1]) if self.groups and self._same_step(reading) else 0

    def add(self, reading: Reading, recorder: Recorder, vectors: Tensor, changes: Changes | None = None) -> None:
        """Append a call, with what `recorder` kept of it and how its cuts had changed."""
        self.recorder = recorder
        if sum(map(len, self.groups)) >= MOST_CALLS:
            self.full = True
            return
        if self.groups and self._same_step(reading):
            self.groups[-1].append(_Call(reading, vectors, changes))
        else:
            self.groups.append([_Call(reading, vectors, changes)])

    def fill_first(self, vectors: Tensor, recorder: Recorder) -> None:
        """Let the first calls, whose output nobody saw, have the second ones' in its place."""
        for call in self.groups[0]:
            whole = vectors.clone()
            whole[0] = call.vectors[0] if call.vectors.shape == whole.shape else whole[0]
            call.vectors = whole
        self.recorder = recorder

    def _same_step(self, reading: Reading) -> bool:
        last = self.groups[-1][-1].reading
        times = self.time_inputs()
        return reading.sample == last.sample and all(reading.small[i] == last.small[i] for i in times)

    def time_inputs(self) -> tuple[int, ...]:
        """Small inputs whose values ever were all new from one step to the next."""
        found = []
        for i in range(len(self.inputs.small)):
            sets = [{call.reading.small[i] for call in group} for group in self.groups]
            if any(not (a & b) for a, b in itertools.pairwise(sets)):
                found.append(i)
        return tuple(found)

    def varying_inputs(self) -> tuple[int, ...]:
        """Large inputs, beside the latents, that change from step to step: at most steps, for one that is overwritten
        once, in the middle, is still to be the same from then on."""
        found = []
        for i in range(len(self.inputs.large)):
            changes = [
                any(not any(now.reading.large[i].same(before.reading.large[i]) for before in previous) for now in group)
                for previous, group in itertools.pairwise(self.groups)
            ]
            if 2 * sum(changes) > len(changes):
                found.append(i)
        return tuple(found)

    def starts_anew(self, reading: Reading) -> bool:
        """Whether a call belongs to a new generation: its timestep is back at the first one, or runs the other way."""
        if not self.groups or self._same_step(reading):
            return False
        first, last = self.groups[0][0].reading, self.groups[-1][-1].reading
        if reading.shapes != last.shapes:
            return True
        for i in self.time_inputs():
            start, before, now = (sum(r.small[i]) / max(1, len(r.small[i])) for r in (first, last, reading))
            if now == start and before != start:
                return True
            if (now - before) * (before - start) < 0:
                return True
        return False

    def is_over(self, reading: Reading, inputs: Inputs) -> bool:
        """Whether a call of another shape, maybe of another capture with other `inputs`, shows that this generation is
        over: its timestep is back at the first one, or runs the other way.

        One that follows the timesteps may be a generation beside it, or a further stream of it.
        """
        if self.num_steps < FEWEST_STEPS:
            return False
        first, last = self.groups[0][0].reading, self.groups[-1][-1].reading
        for i in self.time_inputs():
            name = self.inputs.plain_name(self.inputs.small[i])
            names = [inputs.plain_name(position) for position in inputs.small]
            at = i if inputs is self.inputs else names.index(name) if name and name in names else None
            if at is None:
                continue
            values = first.small[i], last.small[i], reading.small[at]
            start, before, now = (sum(value) / max(1, len(value)) for value in values)
            if (now == start and before != start) or (now - before) * (before - start) < 0:
                return True
        return False

    def problem(self) -> str:
        """Why this recording cannot become a profile; empty if it can."""
        if self.full:
            return f"the generation has more than {MOST_CALLS} calls"
        if self.num_steps < FEWEST_STEPS:
            return f"it saw {self.num_steps} steps, and at least {FEWEST_STEPS} are needed to plan anything"
        if len({len(group) for group in self.groups}) > 1:
            return "the number of calls with the same latents differs from step to step"
        if not self.time_inputs():
            return "no small input changes from step to step, so there is no timestep to tell the steps by"
        if not all(call.reading.finite for group in self.groups for call in group):
            return "latents held NaN or infinity"
        samples = [group[0].reading for group in self.groups]
        jumps = [
            c.moved_from(b) > 2.0 * c.moved_from(a) for a, b, c in zip(samples, samples[1:], samples[2:], strict=False)
        ]
        if sum(jumps) > len(jumps) / 2:
            return "two generations seem to have been mixed; mark each with omnifx.generation(...)"
        return ""

    def timeline(self) -> Timeline:
        """Timesteps and moves of this generation."""
        firsts = [group[0].reading for group in self.groups]
        times = self.time_inputs()
        return Timeline(
            timesteps=tuple(sum(r.small[times[0]]) / len(r.small[times[0]]) for r in firsts),
            moves=(0.0, *(b.moved_from(a) for a, b in itertools.pairwise(firsts))),
            time_inputs=times,
            varying_inputs=self.varying_inputs(),
        )

    def _names(self, positions: list[int]) -> tuple[str, ...]:
        names = tuple(map(self.inputs.plain_name, positions))
        return names if all(names) else ()

    def profile(
        self,
        *,
        model: str,
        fingerprint: str,
        versions: dict[str, str],
        flops: int,
        reuse_flops: int | None = None,
        branches: tuple[BranchMeta, ...],
        blocks: tuple[BlockMeta, ...] = (),
        spans: tuple[SpanMeta, ...] = (),
        output_shape: tuple[int, ...],
        measured: tuple[str, ...] = (),
        place: str = "",
    ) -> Profile:
        """The profile of this one run; call only if there is no `problem`. `place` tells where it ran."""
        assert self.recorder is not None  # there is no problem, so there are calls
        timeline = self.timeline()
        streams = range(len(self.groups[0]))
        grams = []
        for stream in streams:
            kept = torch.stack([group[stream].vectors for group in self.groups])  # [S, 3, n]
            grams.append(self.recorder.grams(kept.transpose(0, 1).reshape(3 * self.num_steps, -1)))
        changes = self._changes() if measured else None
        meta = ProfileMeta(
            model=model,
            fingerprint=fingerprint,
            versions=versions,
            timesteps=timeline.timesteps,
            num_streams=len(streams),
            num_runs=1,
            flops=flops,
            reuse_flops=reuse_flops,
            branches=branches,
            blocks=blocks,
            spans=spans,
            latent_shape=self.groups[0][0].reading.shapes[-1] if self.inputs.latents is not None else (),
            output_shape=output_shape,
            filter_axes=self.recorder.grid.axes,
            time_inputs=timeline.time_inputs,
            varying_inputs=timeline.varying_inputs,
            time_names=self._names([self.inputs.small[i] for i in timeline.time_inputs]),
            varying_names=self._names([self.inputs.large[i] for i in timeline.varying_inputs]),
            measured=measured if changes is not None else (),
            num_lags=changes.shape[-2] - 1 if changes is not None else 0,
            sketched=self.recorder.sketched,
            timing=self._timing(place),
        )
        moves = torch.tensor([timeline.moves])
        path = path_of([[call.vectors for call in group] for group in self.groups], self.recorder)
        prior = self.prior.finish() if self.prior is not None else None
        return Profile(
            meta=meta,
            grams=torch.stack(grams)[None],
            moves=moves,
            changes=changes,
            prior=prior,
            path=path[None] if path is not None else None,
        )

    def _timing(self, place: str) -> Timing | None:
        """What calls take once the first two steps, which compile and allocate, are over; None if nobody looked."""
        settled = self.times_ms[2 * len(self.groups[0]) :]
        if not settled:
            return None
        step, overhead = (statistics.median(column) for column in zip(*settled, strict=True))
        shape = self.groups[0][0].reading.shapes[-1] if self.inputs.latents is not None else ()
        return Timing(step_ms=step, overhead_ms=overhead, device=place, latent_shape=shape)

    def _changes(self) -> Tensor | None:
        """[1, streams, S, lags + 1, columns]; None if some call was not compared."""
        calls = [[group[stream].changes for group in self.groups] for stream in range(len(self.groups[0]))]
        tables = [[torch.cat([c.errors, c.growth[None]]) for c in stream if c is not None] for stream in calls]
        if any(len(table) < self.num_steps for table in tables):
            return None
        return torch.stack([torch.stack(table) for table in tables])[None].cpu()
