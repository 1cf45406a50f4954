"""What to say of a model in which nothing can be reused: what was seen, why it was refused, and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import fx

from omnifx.breaks import GraphBreak
from omnifx.flops import is_attention
from omnifx.graph import Analysis, BitSets, node_flops
from omnifx.passes.find_branches import ADDITIONS

_ADVICE = (
    "Expected additions x + f(x) around attention and feed-forward layers, with x descending from the latents: pass "
    "the transformer itself (not a pipeline, a text encoder or one layer), under torch.no_grad(), inputs as tensors."
)

_KINDS = {
    "mm": "matrix products",
    "addmm": "matrix products",
    "bmm": "batched matrix products",
    "baddbmm": "batched matrix products",
    "convolution": "convolutions",
}


def nothing_found(
    model: str,
    graphs: Sequence[tuple[fx.GraphModule, Analysis]],
    breaks: Sequence[GraphBreak] = (),
    *,
    hooks: str = "",
) -> str:
    """One message: operators, heavy operators by kind, residual adds and why each was refused, what to do."""
    heavy: Counter[str] = Counter()
    additions: Counter[str] = Counter()
    operators = 0
    for gm, analysis in graphs:
        operators += sum(node.op == "call_function" for node in gm.graph.nodes)
        heavy.update(_kind(node) for node in gm.graph.nodes if node_flops(node))
        additions.update(_additions(gm, analysis))
    refused = [branch for _, analysis in graphs for branch in analysis.branches]
    kinds = ", ".join(f"{count} {kind}" for kind, count in heavy.most_common()) or "none"
    lines = [
        f"no branch of {model} can be reused.",
        f"Seen: {operators} operators in {len(graphs)} graph(s); those that cost FLOPs: {kinds}.",
    ]
    if refused:
        reasons = Counter(branch.reason for branch in refused)
        first = {reason: next(b.name for b in refused if b.reason == reason) for reason in reasons}
        told = "; ".join(f"{count} such as {first[reason]}: {reason}" for reason, count in reasons.most_common(4))
        lines.append(f"Residual branches: {len(refused)}, all refused ({told}).")
    else:
        told = "; ".join(f"{count} where {reason}" for reason, count in additions.most_common())
        lines.append(f"Residual branches: none among {additions.total()} addition(s)" + f" ({told})" * bool(told) + ".")
    if breaks:
        more = f", and {len(breaks) - 1} more" if len(breaks) > 1 else ""
        lines.append(f"Graph breaks: {breaks[0].place}{more}; the first: {breaks[0].reason} Remove them first.")
    if hooks:
        lines.append(hooks)
    return "\n  ".join([*lines, _ADVICE])


def _kind(node: fx.Node) -> str:
    target = getattr(node.target, "overloadpacket", node.target)
    name = str(getattr(target, "__name__", target)).strip("_")
    if is_attention(node):
        return "attention"
    return _KINDS.get(name, name)


def _additions(gm: fx.GraphModule, analysis: Analysis) -> Counter[str]:
    """Why each addition of two tensors is no residual add, in the terms of `find_branches`."""
    sets = BitSets.of(gm.graph)
    placeholders = [node for node in sets.nodes if node.op == "placeholder"]
    inputs = analysis.inputs
    static = sum(1 << sets.index[placeholders[i]] for i in (*inputs.static, *inputs.sizes))
    data = sum(1 << sets.index[node] for node in placeholders) & ~static
    heavy = sum(1 << i for i, node in enumerate(sets.nodes) if node_flops(node) and sets.ancestors[i] & data)
    adds = {name for branch in analysis.branches for name in branch.adds}
    counts: Counter[str] = Counter()
    for node in sets.nodes:
        operands = [arg for arg in node.args[:2] if isinstance(arg, fx.Node)]
        if getattr(node.target, "overloadpacket", None) not in ADDITIONS or len(operands) < 2 or node.name in adds:
            continue
        a, b = (sets.ancestors[sets.index[operand]] for operand in operands)
        if not (a & data and b & data):
            counts["one operand is a parameter or constant"] += 1
        elif not (a & b & data):
            counts["the operands descend from different inputs"] += 1
        elif not (a ^ b) & heavy:
            counts["no heavy operator lies on one side only"] += 1
        else:
            counts["neither operand passes x on unchanged in size and free of FLOPs"] += 1
    return counts
