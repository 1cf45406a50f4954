"""Words of the graph world: inputs and their roles, branches, passes, and small tools that several passes share."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from omnifx.errors import PassError
from omnifx.flops import hint, is_attention, node_flops, num_bytes, numel, tensors_in

ANALYSIS = "omnifx_analysis"
PLAIN_NAME = "omnifx_plain_name"
"""What the model's author calls an input."""
ARGUMENT = "omnifx_argument"
"""Where in the call of the model an input's value stood; 0 if unknown."""
SETTING = "omnifx_setting"
"""True for an input that is a number kept in a module (a LoRA's scale)."""
EXTRA_INPUTS = "omnifx_extra_inputs"
EXTRA_OUTPUTS = "omnifx_extra_outputs"
CONDITIONS = "omnifx_conditions"
"""Where `HoistConditions` leaves the graph of what it hoisted."""

SMALL = 4096
"""Inputs of at most this many elements (and never the latents) count as small: timesteps, labels, scales."""


@dataclass(frozen=True)
class Inputs:
    """The roles of a graph's inputs, by position.

    `latents` is what the sampler moves, `small` inputs (timesteps, labels, scales) are read by the clock at every call,
    `large` ones (text, masks, position tables) are watched for change, `static` ones are parameters and buffers.
    `settings`, which are among the static ones, are numbers kept in modules (a LoRA's scale): they come in a new tensor
    at each call.
    `further_latents`, which are among the large ones, move as well: the audio of a model of video and audio.
    """

    latents: int | None
    small: tuple[int, ...]
    large: tuple[int, ...]
    static: tuple[int, ...]
    names: tuple[str, ...]
    further_latents: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    """Whole numbers that are sizes of other inputs, in a graph with dynamic shapes."""
    plain_names: tuple[str, ...] = ()
    """What the model's author calls each input, as far as is known: the same in every capture of a model."""

    def plain_name(self, position: int) -> str:
        """The name of an input that another capture of the same model has as well; empty if unknown."""
        return self.plain_names[position] if position < len(self.plain_names) else ""

    settings: tuple[int, ...] = ()


@dataclass(frozen=True)
class TokenSource:
    """An attention that tells something of a branch's tokens: they are `start` .. `start + number` of its `total`."""

    node: str
    start: int
    total: int


@dataclass(frozen=True)
class Tokens:
    """How a branch may be computed for some of its tokens alone, as `omnifx.passes.prove_tokens` found."""

    batch: int
    """Samples; each may have other tokens computed."""
    number: int
    """Tokens of a sample."""
    flops: int
    """FLOPs in proportion to the tokens computed."""
    spared_flops: int
    """FLOPs of what is not computed for however many tokens: the attention that a parallel branch joins."""
    held: tuple[str, ...] = ()
    """Names of nodes whose values are cached beside the cut: the attention that a parallel branch joins."""
    held_bytes: int = 0
    keys: TokenSource | None = None
    """The attention that has these tokens as keys; None if none is known."""
    queries: TokenSource | None = None
    """The cross-attention that has these tokens as queries; None if none is known."""
    grid: tuple[int, int] | None = None
    """Rows and columns, if the tokens are an image."""


@dataclass(frozen=True)
class Branch:
    """``f`` in ``x + f(x)``: what may be computed, or reused from an earlier step."""

    name: str
    kind: str
    """self_attention, cross_attention, joint_attention, mlp, conv, or parallel (attention and MLP fused)."""
    dependence: str
    """latent (reuse is an approximation), timestep, or invariant (reuse within a generation is exact)."""
    module_path: str
    adds: tuple[str, ...]
    """Names of the residual-add nodes."""
    heavy: tuple[str, ...]
    """Names of the nodes that cost FLOPs and belong to this branch alone."""
    cuts: tuple[str, ...]
    """Names of the nodes whose values are cached."""
    flops: int
    """FLOPs that die when the cuts are read from the cache."""
    cache_bytes: int
    cacheable: bool
    reason: str
    """Why it is not cacheable; empty if it is."""
    trunks: tuple[int, ...] = ()
    """The trunk of each of `adds`, 0 being the latents'; empty until `omnifx.trunks` looked."""
    tokens: Tokens | None = None
    """How it may be computed for some tokens alone; None if it may not."""
    token_reason: str = ""
    """Why it may not be; empty if it may, or if nobody asked."""


@dataclass(frozen=True)
class Analysis:
    """What `FindBranches` found in a graph."""

    inputs: Inputs
    branches: tuple[Branch, ...]
    flops: int
    """FLOPs of the whole graph."""
    reuse_flops: int
    """FLOPs left when every cacheable branch is reused."""

    @property
    def left(self) -> float:
        """Share of a full step that a step costs which reuses everything."""
        return self.reuse_flops / self.flops if self.flops else 1.0

    @property
    def cacheable(self) -> tuple[Branch, ...]:
        """The branches that may be reused, in graph order."""
        return tuple(branch for branch in self.branches if branch.cacheable)


def analysis_of(gm: fx.GraphModule) -> Analysis:
    """The analysis that `FindBranches` left on the graph. Raises PassError if it has not run."""
    found = gm.meta.get(ANALYSIS)
    if not isinstance(found, Analysis):
        raise PassError("the graph has no analysis; run FindBranches first.")
    return found


def branches_of(gm: fx.GraphModule) -> dict[str, Branch]:
    """The cacheable branches of a graph by name."""
    return {branch.name: branch for branch in analysis_of(gm).cacheable}


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """One graph transformation: `requires` checks what it needs, `call` changes the graph in place, `ensures` what it
    promised."""

    @property
    def name(self) -> str:
        """The pass's name, as errors and dumps print it."""
        return type(self).__name__

    def requires(self, gm: fx.GraphModule) -> None:
        """Raise PassError unless the pass can run on `gm`."""

    @abstractmethod
    def call(self, gm: fx.GraphModule) -> bool:
        """Change `gm` in place; return whether anything changed."""

    def ensures(self, gm: fx.GraphModule) -> None:
        """Raise PassError unless `gm` is what the pass promises."""

    def __call__(self, gm: fx.GraphModule) -> bool:
        self.requires(gm)
        changed = self.call(gm)
        if changed:
            gm.graph.lint()
            gm.recompile()
        self.ensures(gm)
        return changed


def run_passes(gm: fx.GraphModule, passes: Sequence[Pass], *, label: str = "graph") -> dict[str, float]:
    """Run `passes` in order; returns the seconds each took. With OMNIFX_DUMP=dir, writes the graph before and after
    each."""
    dump = os.environ.get("OMNIFX_DUMP")
    seconds: dict[str, float] = {}
    for number, step in enumerate(passes):
        stem = f"{label}.{number:02d}_{step.name}"
        if dump:
            _write_text(Path(dump) / f"{stem}.before.txt", gm)
        start = time.perf_counter()
        step(gm)
        seconds[step.name] = seconds.get(step.name, 0.0) + time.perf_counter() - start
        if dump:
            _write_text(Path(dump) / f"{stem}.after.txt", gm)
    return seconds


def _write_text(path: Path, gm: fx.GraphModule) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(gm.graph) + "\n", encoding="utf-8")


def clone(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph with the same node names and metadata; parameters and sub-modules are shared, not copied."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        copied = graph.node_copy(node, mapping.__getitem__)
        copied.meta = dict(node.meta)
        mapping[node] = copied
        if copied.name != node.name:
            copied._rename(node.name)
    result = fx.GraphModule(gm, graph)
    result.meta = dict(gm.meta)
    result.meta[EXTRA_INPUTS] = list(gm.meta.get(EXTRA_INPUTS, ()))
    result.meta[EXTRA_OUTPUTS] = list(gm.meta.get(EXTRA_OUTPUTS, ()))
    return result


def node_named(gm: fx.GraphModule, name: str) -> fx.Node:
    """The node of that name. Raises PassError if there is none."""
    if (node := nodes_by_name(gm).get(name)) is not None:
        return node
    raise PassError(f"the graph has no node {name!r}; it changed since it was analysed. Run FindBranches again.")


def nodes_by_name(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """All nodes by name."""
    return {node.name: node for node in gm.graph.nodes}


def output_of(gm: fx.GraphModule) -> fx.Node:
    """The output node; its first argument is a flat tuple of values."""
    node: fx.Node = gm.graph.output_node()
    if not isinstance(node.args[0], tuple | list):
        raise PassError(f"the graph returns {node.args[0]}, expected a flat tuple; capture it through AOTAutograd.")
    return node


def insert_input(gm: fx.GraphModule, name: str, *, label: str, like: torch.Tensor) -> fx.Node:
    """Add an input after the last one; `label` tells the runner what to feed (see `EXTRA_INPUTS`)."""
    last = [node for node in gm.graph.nodes if node.op == "placeholder"][-1]
    with gm.graph.inserting_after(last):
        placeholder = gm.graph.placeholder(name)
    placeholder.meta["val"] = like.detach()  # a tensor of its own: tracing tells values apart by identity
    gm.meta.setdefault(EXTRA_INPUTS, []).append(label)
    return placeholder


def append_output(gm: fx.GraphModule, node: fx.Node, *, label: str) -> None:
    """Return one more value; `label` tells the runner what it is (see `EXTRA_OUTPUTS`)."""
    output = output_of(gm)
    values = tuple(output.args[0])  # type: ignore[arg-type]
    output.args = ((*values, node),)
    if "user_visible_output_idxs" in output.meta:  # keeps the strides of this value as its users will assume them
        output.meta["user_visible_output_idxs"] = [*output.meta["user_visible_output_idxs"], len(values)]
    if "output_stack_traces" in output.meta:
        output.meta["output_stack_traces"] = [*output.meta["output_stack_traces"], None]
    gm.meta.setdefault(EXTRA_OUTPUTS, []).append(label)


def inline(
    gm: fx.GraphModule, function: Callable[..., torch.Tensor], args: Sequence[fx.Node], *, before: fx.Node
) -> fx.Node:
    """Trace `function` to ATen operators on the values of `args`, and insert the result before a node.

    Returns: the node that holds the function's one tensor.
    """
    return inline_all(gm, function, args, before=before)[0]


def inline_all(
    gm: fx.GraphModule, function: Callable[..., Any], args: Sequence[fx.Node], *, before: fx.Node
) -> list[fx.Node]:
    """As `inline`, for a function that returns a tensor or a sequence of them.

    Returns: the nodes that hold its tensors.
    """
    from torch._inductor.decomposition import select_decomp_table

    values = [arg.meta["val"] for arg in args]
    mode = next((leaf.fake_mode for value in values for leaf in tensors_in(value) if hasattr(leaf, "fake_mode")), None)
    if mode is None:
        traced = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*values)
    else:
        with mode:
            traced = make_fx(function, decomposition_table=select_decomp_table())(*values)
    mapping: dict[fx.Node, fx.Node] = {}
    inputs = iter(args)
    with gm.graph.inserting_before(before):
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                mapping[node] = next(inputs)
            elif node.op == "output":
                result = node.args[0]
                return [mapping[value] for value in (result if isinstance(result, tuple | list) else (result,))]
            elif node.op == "get_attr":
                raise PassError(f"inline: {function} made the constant {node.target}; pass it as an argument instead.")
            else:
                mapping[node] = gm.graph.node_copy(node, mapping.__getitem__)
                mapping[node].meta = dict(node.meta)
    raise PassError(f"inline: {function} has no output.")


def graph_text(gm: fx.GraphModule) -> str:
    """The graph on one line, for golden tests: ``name | op(args) | ...``."""
    parts = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            parts.append(node.name)
        elif node.op == "output":
            parts.append(f"return({', '.join(map(str, node.args[0]))})")
        else:
            target = getattr(node.target, "overloadpacket", node.target)
            label = getattr(target, "__name__", str(target))
            operands = ", ".join(arg.name for arg in node.all_input_nodes)
            parts.append(f"{node.name} = {label}({operands})")
    return " | ".join(parts)


def argument_of(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of an ATen operator by the name in its schema."""
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    if name in node.kwargs:
        return node.kwargs[name]
    at = names.index(name) if name in names else len(node.args)
    return node.args[at] if at < len(node.args) else default


def total_flops(gm: fx.GraphModule) -> int:
    """FLOPs of every node of the graph."""
    return sum(map(node_flops, gm.graph.nodes))


def dead_without(cuts: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that nothing needs once the values of `cuts` come from elsewhere; the cuts themselves are among
    them."""
    dead: set[fx.Node] = set()
    work = list(cuts)
    dead.update(work)
    while work:
        for parent in work.pop().all_input_nodes:
            if parent not in dead and parent.op != "placeholder" and all(user in dead for user in parent.users):
                dead.add(parent)
                work.append(parent)
    return dead


def side_effects(gm: fx.GraphModule) -> str:
    """What a run of the graph does beside computing its outputs, in words; empty if nothing.

    Such a graph is not the same run twice as run once.
    """
    for node in gm.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target._schema.is_mutable:
            written = [arg.name for arg in node.all_input_nodes if arg.op == "placeholder"]
            return f"writes to its input or buffer {written[0] if written else node.name}"
        if _draws(node):
            return f"draws random numbers ({node.name})"
    return ""


def _draws(node: fx.Node) -> bool:
    """Whether an operator advances a random generator; fused attention does so only with dropout."""
    target: Any = node.target
    if is_attention(node):
        names = [argument.name for argument in target._schema.arguments]
        return bool({**dict(zip(names, node.args, strict=False)), **node.kwargs}.get("dropout_p", 0.0))
    return torch.Tag.nondeterministic_seeded in target.tags or "::inductor_seed" in target.name()


def float_outputs(gm: fx.GraphModule) -> list[int]:
    """Positions of the outputs that hold floating-point tensors with at least one axis besides the batch."""
    return [
        position
        for position, node in enumerate(output_of(gm).args[0])  # type: ignore[arg-type]
        if isinstance(node, fx.Node)
        and isinstance(value := node.meta.get("val"), torch.Tensor)
        and value.is_floating_point()
        and value.dim() >= 2
    ]


@dataclass
class BitSets:
    """Ancestors and descendants of every node as bit sets (Python integers): bit i stands for node i. Includes the node
    itself."""

    nodes: list[fx.Node]
    index: dict[fx.Node, int] = field(default_factory=dict)
    ancestors: list[int] = field(default_factory=list)
    descendants: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, graph: fx.Graph) -> BitSets:
        """Bit sets of a graph, whose nodes stand in topological order."""
        nodes = list(graph.nodes)
        index = {node: i for i, node in enumerate(nodes)}
        ancestors: list[int] = []
        for i, node in enumerate(nodes):
            bits = 1 << i
            for parent in node.all_input_nodes:
                bits |= ancestors[index[parent]]
            ancestors.append(bits)
        descendants = [0] * len(nodes)
        for i in range(len(nodes) - 1, -1, -1):
            bits = 1 << i
            for user in nodes[i].users:
                bits |= descendants[index[user]]
            descendants[i] = bits
        return cls(nodes, index, ancestors, descendants)

    def members(self, bits: int) -> Iterator[int]:
        """The positions of the set bits, ascending."""
        while bits:
            low = bits & -bits
            yield low.bit_length() - 1
            bits ^= low


__all__ = [
    "ANALYSIS",
    "ARGUMENT",
    "CONDITIONS",
    "EXTRA_INPUTS",
    "EXTRA_OUTPUTS",
    "PLAIN_NAME",
    "SETTING",
    "SMALL",
    "Analysis",
    "BitSets",
    "Branch",
    "Inputs",
    "Pass",
    "TokenSource",
    "Tokens",
    "analysis_of",
    "append_output",
    "argument_of",
    "branches_of",
    "clone",
    "dead_without",
    "float_outputs",
    "graph_text",
    "hint",
    "inline",
    "inline_all",
    "insert_input",
    "node_flops",
    "node_named",
    "nodes_by_name",
    "num_bytes",
    "numel",
    "output_of",
    "run_passes",
    "side_effects",
    "tensors_in",
    "total_flops",
]


def value_of(node: fx.Node) -> Any:
    """The fake value that the capture stored for a node."""
    return node.meta.get("val")
