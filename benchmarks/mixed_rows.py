"""Whether it pays to compute a part of a step: attention reused and MLPs computed, the reverse, or half of the blocks.

    python -m benchmarks.mixed_rows [--cases dit-20 flow-20 video-20 dit-20-eta1] [--samples 16] [--gaps 1 2 3]
        [--out benchmarks/results/mixed_rows.json] [--smoke]

`auto` forecasts a step that is not computed from outputs and latents of computed ones. A mixed step adds one more
column to that combination: the output of the network with some branches as they were `gap` steps ago. Both fits are of
calibration seeds, their errors of reported seeds.

cost     FLOPs of the mixed step, over a computed one
leaves   squared error of the mixed step over that of the forecast without it, both summed over all steps
rival    what is left where the same FLOPs compute some of the steps whole and forecast the others: 1 - cost. This is
         kind to mixed steps: a whole one also shortens the gaps behind it.
pays to  the cost below which the mixed step would be worth its FLOPs: 1 - leaves

Branches are replaced in the modules themselves; nothing is compiled. Half a minute for a case on one core.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.frontier_cases import CASES, Case, labels_of
from benchmarks.pages import Figures
from benchmarks.quality import FIRST_CALIBRATION_SEED
from benchmarks.results import save, table

DEFAULT = ("dit-20", "flow-20", "video-20", "dit-20-eta1")
ATTENTION, MLP = ("attn1", "attn2"), ("ff",)
RIDGE = 1e-4
"""Pull of the weights towards zero, as a share of each column's energy."""


@dataclass
class Call:
    """One call of the network: its arguments, its output, and what its branches gave."""

    inputs: dict[str, Any]
    output: Tensor
    branches: dict[str, Tensor]


@dataclass
class Network:
    """A network whose branches can be read and replaced; it records all calls that are not made through `mixed`."""

    model: nn.Module
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.branches = {
            name: module for name, module in self.model.named_modules() if name.rpartition(".")[2] in (*ATTENTION, *MLP)
        }

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> tuple[Tensor]:
        seen: dict[str, Tensor] = {}
        with _hooked({name: _reader(name, seen) for name in self.branches}, self.branches):
            output = self.model(**inputs)[0]
        self.calls.append(Call(inputs, output, seen))
        return (output,)

    @torch.no_grad()
    def mixed(self, inputs: dict[str, Any], given: Mapping[str, Tensor]) -> Tensor:
        """The output where some branches give what is `given`."""
        with _hooked({name: _writer(value) for name, value in given.items()}, self.branches):
            output: Tensor = self.model(**inputs)[0]
        return output

    def kinds(self) -> dict[str, tuple[str, ...]]:
        """Which branches are reused, by what is computed."""
        names = tuple(self.branches)
        blocks = list(dict.fromkeys(map(_block_of, names)))
        late = frozenset(blocks[len(blocks) // 2 :])
        return {
            "nothing": names,
            "MLPs": tuple(name for name in names if name.rpartition(".")[2] in ATTENTION),
            "attention": tuple(name for name in names if name.rpartition(".")[2] in MLP),
            "second half": tuple(name for name in names if _block_of(name) not in late),
            "first half": tuple(name for name in names if _block_of(name) in late),
        }

    def costs(self, inputs: dict[str, Any]) -> dict[str, float]:
        """FLOPs with these branches computed, over those of a whole call."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.model(**inputs)
        counts, total = counter.get_flop_counts(), counter.get_total_flops()
        root = type(self.model).__name__
        spent = {name: sum(counts[f"{root}.{name}"].values()) for name in self.branches}
        return {kind: 1.0 - sum(spent[name] for name in reused) / total for kind, reused in self.kinds().items()}


def _block_of(name: str) -> str:
    found = re.match(r".*?\.\d+", name)
    return found.group() if found else name


def _reader(name: str, seen: dict[str, Tensor]) -> Any:
    def read(module: nn.Module, arguments: Any, output: Tensor) -> None:
        seen[name] = output

    return read


def _writer(value: Tensor) -> Any:
    return lambda module, arguments, output: value


@contextmanager
def _hooked(hooks: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> Iterator[None]:
    handles = [modules[name].register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def recorded(network: Network, case: Case, seeds: Sequence[int]) -> list[Call]:
    """The calls of one generation."""
    network.calls = []
    case.sample(network, seeds=seeds, labels=labels_of(len(seeds)), steps=case.steps)
    if len(network.calls) != case.steps:
        raise RuntimeError(f"{case.name}: {len(network.calls)} calls in {case.steps} steps; one each is expected.")
    return network.calls


def columns(calls: Sequence[Call], k: int, gap: int) -> tuple[Tensor, list[Tensor]]:
    """The output of step `k`, and what a forecast of it reads: two outputs and the ways of the latents."""
    now, last, before = (calls[j] for j in (k, k - gap, k - gap - 1))
    x = now.inputs["hidden_states"]
    moved = [_like(x - each.inputs["hidden_states"], now.output) for each in (last, before)]
    return now.output, [last.output, before.output, *moved]


def _like(latents: Tensor, output: Tensor) -> Tensor:
    """Latents in the shape of an output, which may have twice their channels (a learned variance)."""
    repeated = output.shape[1] // latents.shape[1]
    return latents.repeat(1, repeated, *(1,) * (latents.dim() - 2))


def weights_of(target: Tensor, features: Sequence[Tensor]) -> Tensor:
    """[c], float64: the weights of least squares."""
    matrix = torch.stack([each.flatten().double() for each in features])
    gram = matrix @ matrix.T
    gram += RIDGE * torch.diag(gram.diagonal())
    return torch.linalg.solve(gram, matrix @ target.flatten().double())


def error_of(target: Tensor, features: Sequence[Tensor], weights: Tensor) -> float:
    """The sum of squared errors of a combination."""
    combined = sum(weight * each.double() for weight, each in zip(weights, features, strict=True))
    return float((combined - target.double()).square().sum())


def rows_of(case: Case, *, samples: int, gaps: Sequence[int]) -> list[Figures]:
    """The rows of one case."""
    network = Network(case.load())
    fitted, reported = (recorded(network, case, range(first, first + samples)) for first in (FIRST_CALIBRATION_SEED, 0))
    costs, rows = network.costs(reported[0].inputs), []
    for gap in gaps:
        plain, left = 0.0, dict.fromkeys(costs, 0.0)
        for k in range(gap + 1, case.steps):
            (fit, known), (true, read) = (columns(calls, k, gap) for calls in (fitted, reported))
            plain += error_of(true, read, weights_of(fit, known))
            for kind, reused in network.kinds().items():
                of_fit, of_report = (
                    network.mixed(calls[k].inputs, {name: calls[k - gap].branches[name] for name in reused})
                    for calls in (fitted, reported)
                )
                left[kind] += error_of(true, [of_report, *read], weights_of(fit, [of_fit, *known]))
        for kind, cost in costs.items():
            leaves = left[kind] / plain
            rows.append(
                {
                    "case": case.name,
                    "gap": gap,
                    "computed": kind,
                    "cost": cost,
                    "leaves": leaves,
                    "rival": 1.0 - cost,
                    "pays to": 1.0 - leaves,
                }
            )
    return rows


def main(arguments: list[str] | None = None) -> list[Figures]:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(DEFAULT))
    parser.add_argument("--samples", type=int, default=16, help="to fit on, and as many to report")
    parser.add_argument("--gaps", type=int, nargs="+", default=[1, 2, 3], help="steps since the last computed one")
    parser.add_argument("--out", default="", help="a JSON file to write")
    parser.add_argument("--smoke", action="store_true", help="flow-20 with 2 samples and a gap of 1: ten seconds")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases, samples, gaps = (["flow-20"], 2, [1]) if args.smoke else (args.cases, args.samples, args.gaps)
    rows: list[Figures] = []
    for name in cases:
        found = rows_of(CASES[name], samples=samples, gaps=gaps)
        table(found, name)
        rows += found
        if args.out:
            save(args.out, rows, quiet=True)  # after each case: what is measured is not lost
    return rows


if __name__ == "__main__":
    main()
