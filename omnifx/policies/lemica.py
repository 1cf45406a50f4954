"""Choose the full steps by a shortest path over all steps: the largest error of any run of reuses is as small as it can
be, then the second largest, and so on.

Source: LeMiCa, arXiv:2511.00090: a graph of the steps, an edge from each full step to the next one, weighted by what
reusing in between does to the final sample; the path of `budget` full steps that is lexicographically minimax.
Ours: the paper measures each edge with a generation of its own, in L1 on the final sample. Here one recorded generation
gives all: reusing at step k adds h_k q to the sample, where h_k is how far the sampler moves along the network's
output, fitted as x_{k+1} = c x_k + h o_k, and q is the noise of cuts that are L steps old, the sum of the last L
recorded ones (see `omnifx.policies.omnicache`). An edge costs the norm of the sum of what its reuses add, relative to
the last latents; how later steps dampen it is not known, and left out. Reuse is of all branches.
Cost: none at run time; the plan is static. Planning takes O(steps^2 max_reuse_run / speedup) on the host.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import networkx as nx
import torch
from torch import Tensor

from omnifx.errors import ConfigError
from omnifx.plan import COMPUTE, REUSE, Action, Plan
from omnifx.policy import Policy, check_speedup, refuse_speedup, register, reuse_steps_needed
from omnifx.profile import Profile

Edge = tuple[int, int]
"""A full step and the next one; the number of steps stands for the end."""


@register
@dataclass(frozen=True, kw_only=True)
class LeMiCa(Policy):
    """The lexicographically minimax choice of `budget` full steps."""

    name: ClassVar[str] = "lemica"

    budget: int | None = None  # full steps of a generation; None: from the speedup, or half of them
    max_reuse_run: int = 6  # reuses in a row
    num_warmup_steps: int = 1  # first steps that are computed

    def __post_init__(self) -> None:
        for option in ("budget", "max_reuse_run", "num_warmup_steps"):
            value = getattr(self, option)
            if option == "budget" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{option} must be a whole number >= 1, got {value!r}.")

    def plan(self, profile: Profile, *, speedup: float | None = None) -> Plan:
        steps = profile.num_steps
        first = min(self.num_warmup_steps, steps)
        fewest = first + (steps - first) // (self.max_reuse_run + 1) if steps > first else first
        if self.budget is not None:
            if self.budget < fewest:
                raise ConfigError(
                    f"{self.name}: budget must be >= {fewest} here ({steps} steps, at most {self.max_reuse_run} reuses "
                    f"in a row), got {self.budget}. Ask for more full steps."
                )
            count = min(self.budget, steps)
        else:
            wanted = check_speedup(speedup, default=2.0)
            count = steps - reuse_steps_needed(profile, wanted)
            if speedup is None:
                count = max(count, fewest)  # nobody asked for a number, so the most there is will do
            if count < fewest:
                dense = [COMPUTE] * fewest + [REUSE] * (steps - fewest)  # its cost is all that counts
                most = Plan.uniform(profile, dense, policy=self.name).speedup
                raise refuse_speedup(self.name, wanted, most, f"at most {self.max_reuse_run} reuses in a row")
        costs = edge_costs(profile, self.max_reuse_run)
        full = cheapest_path(costs, steps, count, first)
        actions: list[Action] = [COMPUTE if step in full else REUSE for step in range(steps)]
        worst = max(costs[edge] for edge in zip(full, [*full[1:], steps], strict=True))
        return Plan.uniform(
            profile,
            actions,
            policy=self.name,
            policy_options={**self.options, "budget": count},
            notes=[f"The worst run of reuses moves the sample by an estimated {worst:.1e} of its norm."],
        )


def edge_costs(profile: Profile, max_run: int) -> dict[Edge, float]:
    """What the reuses between two full steps add to the sample, relative to the last latents; mean over runs and
    streams.

    Returns: a cost >= 0 for each pair of steps with at most `max_run` steps in between; no unit.
    """
    steps = profile.num_steps
    x, o, xo, q = (profile.gram(*pair).sum(2).flatten(0, 1) for pair in ("xx", "oo", "xo", "qq"))  # [N, S, S]
    moves = step_sizes(x, o, xo)
    scale = x[:, -1, -1].clamp_min(1e-30)
    costs: dict[Edge, float] = {}
    for start in range(steps):
        costs[start, start + 1] = 0.0
        weights = torch.zeros_like(moves)  # of each recorded q in what the reuses behind `start` add
        for end in range(start + 2, min(start + max_run + 1, steps) + 1):
            weights[:, start + 1 : end] += moves[:, end - 1 : end]
            energy = torch.einsum("ni,nij,nj->n", weights, q, weights).clamp_min(0.0)
            costs[start, end] = float((energy / scale).sqrt().mean())
    return costs


def step_sizes(x: Tensor, o: Tensor, xo: Tensor) -> Tensor:
    """How far each step moves the sample along the output: h of the best fit x_{k+1} = c x_k + h o_k.

    Args:
        x, o, xo: [N, S, S], inner products of latents, of outputs, and of both.

    Returns: [N, S], the size of h; the last step's, behind which nothing is recorded, is that of the one before.
    """
    steps = x.shape[-1]
    sizes = torch.ones(x.shape[0], steps, dtype=x.dtype)
    for k in range(steps - 1):
        xx, oo, cross = x[:, k, k], o[:, k, k], xo[:, k, k]
        to_x, to_o = x[:, k + 1, k], xo[:, k + 1, k]
        determinant = xx * oo - cross**2
        fit = (xx * to_o - cross * to_x) / determinant.clamp_min(1e-12 * (xx * oo).clamp_min(1e-30))
        sizes[:, k] = fit.abs()
    if steps > 1:
        sizes[:, -1] = sizes[:, -2]
    return sizes


def cheapest_path(costs: Mapping[Edge, float], steps: int, count: int, first: int) -> list[int]:
    """The `count` full steps, `first` ones at the start among them, whose edges, sorted from the most expensive down,
    are lexicographically least.

    Edges weigh powers of a number larger than a path's edges, by the rank of their costs, so that a sum of weights
    orders paths as their sorted costs do; the shortest path over (step, full steps so far) is then the answer.
    """
    ranks = {cost: rank for rank, cost in enumerate(sorted(set(costs.values())))}
    graph: nx.DiGraph[Edge] = nx.DiGraph()
    start, end = (first - 1, first), (steps, count + 1)
    for (a, b), cost in costs.items():
        if a < first - 1:
            continue
        weight = (count + 2) ** ranks[cost]
        for used in range(first, count + 1):
            if (b == steps) == (used == count):
                graph.add_edge((a, used), (b, used + 1), weight=weight)
    path = nx.dijkstra_path(graph, start, end)
    return [*range(first - 1), *(step for step, _ in path[:-1])]
