"""Between full steps, compute the most important and the oldest tokens of MLPs and cross-attentions; reuse the rest.

Source: ToCa, arXiv:2410.05317, and its released code, whose constants are `RELEASES`: ratios R(layer, step, kind) =
r0 * f_layer * f_step * f_kind of a branch's tokens, k = floor(R * tokens) for each sample; intervals N from one full
step to the next, fixed or adapted to the timestep; scores s1 to s4 (`omnifx.tokens`). Self- and joint attentions are
reused whole in partial steps, and so is what cannot be computed by tokens; plans say which and why.
Ours: steps fall into `groups`, in each of which f_step is that of its mean step, so that few variants are compiled; the
default score needs no attention map; kinds that a release does not have take the factors of another one.
Partial steps take longer than their FLOPs say, by about `OVERHEAD` of a full step. So that the planner prefers what is
faster, an asked speedup has to be reached with that counted, and a step that would gain nothing computes everything.
Cost: one variant for each group; scores and ages of all tokens, 4 bytes each; with score="attention" every full step
computes all attention maps once more, unfused.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, get_args

from omnifx.errors import ConfigError
from omnifx.plan import COMPUTE, REUSE, Action, Plan, Row, partial, partial_tokens
from omnifx.policy import SLACK, Policy, check_speedup, refuse_speedup, register
from omnifx.profile import BranchMeta, Profile
from omnifx.tokens import NEEDS_QUERIES, Score, Selection, gives_bonus

STALENESS = 0.25
"""w3: what a token's score gains in an interval in which it is not computed."""

OVERHEAD = 0.05
"""What choosing, gathering and scattering tokens adds to a partial step, as a share of a full step's time: .03 to .06
at 1024 tokens on a CPU, 2 blocks, few tokens or many (`benchmarks.policies_partial`)."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """The constants of one of the released implementations.

    f_layer = layer[0] + layer[1] * l / depth for the l-th block of a stack; f_step = step[0] + step[1] * s / steps,
    with s counting up, or down to 0.
    """

    ratio: float  # r0
    layer: tuple[float, float]
    step: tuple[float, float]
    counts_down: bool = False
    kinds: Mapping[str, float] = field(default_factory=dict)  # f_kind; kinds that are not there are reused
    depth: int | None = None  # None: one less than the blocks of the stack
    interval: int
    pace: tuple[float, float] | None = None  # threshold = round(interval / (pace[0] + pace[1] * s / steps))
    sensitive: tuple[float, float] = (0.0, 0.0)  # where, in s / steps, every second step is full
    first_full: int = 1  # full steps at the start
    cross_interval: int | None = None  # from one computed cross-attention to the next; None: as the others
    score: Score
    bonus: float = 0.0
    window: int = 1
    shares_halves: bool = False

    def threshold(self, interval: int, s: int, steps: int) -> int:
        """Which multiples of steps are full, as seen from step `s`."""
        if self.sensitive[0] * steps <= s < self.sensitive[1] * steps:
            return 2
        assert self.pace is not None
        return max(1, round(interval / (self.pace[0] + self.pace[1] * s / steps)))

    def share(self, ratio: float, kind: str, layer: float, step: float) -> float:
        """R: the share of tokens to compute, in [0, 1]; `layer` and `step` as shares of all."""
        found = ratio * (self.layer[0] + self.layer[1] * layer) * (self.step[0] + self.step[1] * step)
        return min(1.0, max(0.0, found * self.kinds.get(kind, 0.0)))


RELEASES: dict[str, Release] = {
    "dit": Release(  # DiT-XL/2, DDIM, 50 steps
        ratio=0.07, layer=(0.8, 0.4), step=(3.0, -4.0), counts_down=True, interval=3, pace=(1.4, -0.8),
        kinds={"mlp": 2.5, "cross_attention": 0.6, "parallel": 1.6}, sensitive=(0.2, 0.4),
        score="kv-norm", bonus=0.6, window=2,
    ),
    "dit-ddpm": Release(  # DiT-XL/2, DDPM, 250 steps
        ratio=0.07, layer=(1.8, -1.6), step=(1.4, -0.8), counts_down=True, interval=4, pace=(1.4, -0.8),
        kinds={"mlp": 2.5, "cross_attention": 0.6, "parallel": 1.6}, sensitive=(0.2, 0.4),
        score="kv-norm", bonus=0.6, window=2,
    ),
    "pixart": Release(
        ratio=0.3, layer=(1.6, -1.2), step=(1.9, -1.8), interval=3, pace=(0.8, 0.4),
        kinds={"mlp": 1.6, "cross_attention": 0.6, "parallel": 1.6},
        score="entropy", bonus=0.4, window=4, shares_halves=True,
    ),
    "open-sora": Release(
        ratio=0.1, layer=(1.0, 0.0), step=(1.0, 0.0), interval=3, first_full=3, cross_interval=6,
        kinds={"mlp": 1.495, "parallel": 1.495}, score="entropy", shares_halves=True,
    ),
    "flux": Release(
        ratio=0.1, layer=(1.5, -1.0), step=(1.0, 0.0), depth=27, interval=4, first_full=3,
        kinds={"mlp": 0.4, "cross_attention": 0.6, "parallel": 1.6}, score="v-norm",
    ),
}  # fmt: skip


@register
@dataclass(frozen=True, kw_only=True)
class ToCa(Policy):
    """Token-wise caching with the constants of a release; every option but `groups` defaults to the release's."""

    name: ClassVar[str] = "toca"

    release: str = "dit"  # whose constants: one of RELEASES
    ratio: float | None = None  # r0, a share of the tokens; 0 reuses everything between full steps
    interval: int | None = None  # N, steps from one full step to the next
    adaptive: bool | None = None  # whether the interval follows the timestep
    score: Score | None = None  # see `omnifx.tokens.Selection`
    bonus: float | None = None  # s4: what the first token of each window gets on top, as a share of its score
    shares_halves: bool | None = None  # whether both halves of a batch compute the same tokens
    groups: int | None = 4  # parts of a generation in which k is the same; None: each step has its own k, and variant

    def __post_init__(self) -> None:
        if self.release not in RELEASES:
            raise ConfigError(f"{self.name}: release must be one of {sorted(RELEASES)}, got {self.release!r}.")
        if self.score is not None and self.score not in get_args(Score):
            raise ConfigError(f"{self.name}: score must be one of {list(get_args(Score))}, got {self.score!r}.")
        for option, least in (("interval", 1), ("groups", 1)):
            value = getattr(self, option)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ConfigError(f"{self.name}: {option} must be a whole number >= {least}, got {value!r}.")
        for option, most in (("ratio", math.inf), ("bonus", math.inf)):
            value = getattr(self, option)
            if value is not None and not (isinstance(value, int | float) and 0.0 <= value < most):
                raise ConfigError(f"{self.name}: {option} must be a number >= 0, got {value!r}.")
        if self.adaptive and RELEASES[self.release].pace is None:
            raise ConfigError(
                f"{self.name}: the release {self.release!r} has no adaptive intervals; those that have: "
                f"{sorted(name for name, release in RELEASES.items() if release.pace)}."
            )

    @property
    def constants(self) -> Release:
        """Those of the release."""
        return RELEASES[self.release]

    @property
    def selection(self) -> Selection:
        return self._selection(self._interval)

    @property
    def _interval(self) -> int:
        return self.constants.interval if self.interval is None else self.interval

    def _selection(self, interval: int) -> Selection:
        release = self.constants
        return Selection(
            score=self.score or release.score,
            staleness=STALENESS / interval,
            bonus=release.bonus if self.bonus is None else self.bonus,
            window=release.window,
            shares_halves=release.shares_halves if self.shares_halves is None else self.shares_halves,
        )

    def plan(self, profile: Profile, *, speedup: float | None = None) -> Plan:
        if any(branch.tokens is None for branch in profile.meta.branches):
            raise ConfigError(
                f"{self.name}: the profile does not say which branches can be computed by tokens; an older omnifx "
                "measured it. Calibrate again with `omnifx calibrate`."
            )
        if speedup is None:
            return self._plan(profile, self._interval)
        wanted, most = check_speedup(speedup, default=1.0), 1.0
        for interval in [self.interval] if self.interval is not None else range(1, profile.num_steps + 1):
            plan = self._plan(profile, interval)
            reached = speedup_in_time(plan)
            most = max(most, reached)
            if reached >= wanted / (1.0 + SLACK * wanted / profile.num_steps):
                return plan
        raise refuse_speedup(self.name, wanted, most, f"ratio {self._ratio:g} of the tokens")

    @property
    def _ratio(self) -> float:
        return self.constants.ratio if self.ratio is None else float(self.ratio)

    def _plan(self, profile: Profile, interval: int) -> Plan:
        branches, steps = profile.meta.branches, profile.num_steps
        full = self.full_steps(steps, interval)
        layers = layers_of(branches, depth=self.constants.depth)
        rows: list[Row] = []
        since = 0
        for step in range(steps):
            since = 0 if full[step] else since + 1
            if not since:
                rows.append(self._full_row(branches, step))
            elif self._skips(since):
                rows.append((REUSE,) * len(branches))
            else:
                row = tuple(self._action(b, at, step, steps) for b, at in zip(branches, layers, strict=True))
                pays = not has_tokens(row) or profile.meta.cost_of(row) + OVERHEAD < 1.0
                rows.append(row if pays else (COMPUTE,) * len(branches))
        selection = self._selection(interval)
        return Plan.from_rows(
            profile,
            rows,
            policy=self.name,
            policy_options={**self.options, "interval": interval},
            notes=[*_notes(branches, selection), self._variants_note(rows)],
            selection=selection,
        )

    def full_steps(self, steps: int, interval: int) -> list[bool]:
        """Which of `steps` steps compute everything."""
        release = self.constants
        adapts = self.adaptive if self.adaptive is not None else release.pace is not None
        found: list[bool] = []
        threshold = since = 0
        for step in range(steps):
            s = steps - 1 - step if release.counts_down else step
            if adapts:
                is_full = step < release.first_full or s % threshold == 0
                threshold = release.threshold(interval, s, steps) if is_full else threshold
            elif release.cross_interval is not None:
                is_full = step < release.first_full or step % interval == 0
            else:
                is_full = step < release.first_full or since + 1 >= interval
            since = 0 if is_full else since + 1
            found.append(is_full)
        return found

    def _skips(self, since: int) -> bool:
        """Whether a step this long after a full one reuses everything, and counts nothing."""
        return False

    def _full_row(self, branches: Sequence[BranchMeta], step: int) -> Row:
        release = self.constants
        if release.cross_interval is None or step < release.first_full or step % release.cross_interval == 0:
            return (COMPUTE,) * len(branches)
        return tuple(REUSE if branch.kind == "cross_attention" else COMPUTE for branch in branches)

    def _action(self, branch: BranchMeta, layer: float, step: int, steps: int) -> Action:
        if not branch.tokens:
            return REUSE
        release = self.constants
        at = float(step)
        if self.groups is not None:
            part = [k for k in range(steps) if k * self.groups // steps == step * self.groups // steps]
            at = sum(part) / len(part)
        s = steps - 1 - at if release.counts_down else at
        return partial(int(release.share(self._ratio, branch.kind, layer, s / steps) * branch.tokens))

    def _variants_note(self, rows: Sequence[Row]) -> str:
        by_tokens = {row for row in rows if any(action not in (COMPUTE, REUSE) for action in row)}
        return f"{len(set(rows))} variants, {len(by_tokens)} of which compute some tokens"


def has_tokens(row: Row) -> bool:
    """Whether a row computes some tokens of any branch."""
    return any(partial_tokens(action) for action in row)


def speedup_in_time(plan: Plan) -> float:
    """What a plan is expected to gain in time: its FLOPs, and `OVERHEAD` for each step that computes some tokens."""
    spent = sum(plan.reuse_flops[step.variant] for step in plan.steps) + OVERHEAD * sum(map(has_tokens, plan.rows))
    return len(plan.steps) / spent


def layers_of(branches: Sequence[BranchMeta], *, depth: int | None) -> list[float]:
    """For each branch l / depth, its block's place in the stack of blocks that it is in, by its name's first number."""
    places = []
    for branch in branches:
        match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", branch.name)
        places.append((branch.name[: match.start()], int(match[1])) if match else (branch.name, 0))
    stacks: dict[str, list[int]] = {}
    for stack, number in places:
        stacks.setdefault(stack, []).append(number)
    orders = {stack: sorted(set(numbers)) for stack, numbers in stacks.items()}
    return [orders[stack].index(number) / (depth or max(1, len(orders[stack]) - 1)) for stack, number in places]


def _notes(branches: Sequence[BranchMeta], selection: Selection) -> list[str]:
    """What is not done by tokens, and why; what tokens are not scored by."""
    reasons = Counter((branch.kind, branch.token_reason) for branch in branches if not branch.tokens)
    notes = [
        f"{count} {kind} reused whole: {reason or 'nothing is known of their tokens'}"
        for (kind, reason), count in reasons.items()
    ]
    able = [branch for branch in branches if branch.tokens]
    wanted = "queries" if selection.score in NEEDS_QUERIES else "keys"
    blind = sum(wanted not in branch.scores for branch in able) if selection.score != "none" else 0
    if blind:
        notes.append(f"{blind} branches have no attention to score their tokens by; the oldest tokens are computed")
    flat = sum(not gives_bonus(selection, branch.grid) for branch in able)
    if flat and selection.bonus:
        notes.append(f"{flat} branches get no spatial bonus: windows of {selection.window} do not divide their tokens")
    return notes
