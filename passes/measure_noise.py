"""Let a full step also tell what a reuse step would have got wrong: q = output with the old cuts - true output.

Before:  x -> trunk -> branch (the cut) -> mul(gate) -> add(trunk) -> head -> output(y)
After:   the same, and cached_cut (an input) -> mul(gate) -> add(trunk) -> head -> y' ; output(y, y' - y)
Numerics: bitwise equal for the outputs that were there; q is *close* (1e-5 relative in float32) to running the reuse
graph on its own. Everything that does not descend from a cut (embeddings, gates, the trunk's start) is shared, not
computed twice.
"""

from dataclasses import dataclass

import torch
from torch import fx

from omnifx.errors import PassError
from omnifx.graph import (
    EXTRA_INPUTS,
    EXTRA_OUTPUTS,
    BitSets,
    Pass,
    append_output,
    dead_without,
    float_outputs,
    insert_input,
    nodes_by_name,
    output_of,
)
from omnifx.passes.write_cuts import cuts_of, require_branches

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class MeasureNoise(Pass):
    """Append ``noise:<output position>`` for every floating-point output that depends on a cut."""

    branches: tuple[str, ...]  # those whose old cuts are replayed

    def requires(self, gm: fx.GraphModule) -> None:
        require_branches(self, gm, self.branches)
        if taken := set(gm.meta.get(EXTRA_INPUTS, ())):
            raise PassError(f"{self.name}: the graph already reads {sorted(taken)}; it measures full graphs only.")

    def call(self, gm: fx.GraphModule) -> bool:
        names = cuts_of(gm, self.branches)
        by_name = nodes_by_name(gm)
        cuts = [by_name[name] for name in names]
        sets = BitSets.of(gm.graph)
        below = 0
        for cut in cuts:
            below |= sets.descendants[sets.index[cut]]
        positions = noisy_outputs(gm, self.branches)
        outputs = output_of(gm).args[0]
        replaced_work = dead_without(cuts)
        needed = 0
        for position in positions:
            needed |= sets.ancestors[sets.index[outputs[position]]]  # type: ignore[index]
        replayed: dict[fx.Node, fx.Node] = {}
        end = output_of(gm)
        with gm.graph.inserting_before(end):
            for i in sets.members(below & needed):
                node = sets.nodes[i]
                if node in cuts or node in replaced_work or node.op != "call_function":
                    continue
                for parent in node.all_input_nodes:
                    if parent in cuts and parent not in replayed:
                        label = f"cut:{parent.name}"
                        replayed[parent] = insert_input(
                            gm, f"cached_{parent.name}", label=label, like=parent.meta["val"]
                        )
                copied = gm.graph.node_copy(node, lambda n: replayed.get(n, n))
                copied.meta = dict(node.meta)
                replayed[node] = copied
            for position in positions:
                true = outputs[position]  # type: ignore[index]
                noise = gm.graph.call_function(aten.sub.Tensor, (replayed[true], true))  # type: ignore[index]
                noise.meta = {**true.meta, "val": true.meta["val"]}  # type: ignore[union-attr]
                append_output(gm, noise, label=f"noise:{position}")
        return bool(positions)

    def ensures(self, gm: fx.GraphModule) -> None:
        labels = gm.meta.get(EXTRA_OUTPUTS, ())
        if self.branches and not any(label.startswith("noise:") for label in labels):
            raise PassError(
                f"{self.name}: no output depends on the branches {list(self.branches)}, so no noise can be measured."
            )


def noisy_outputs(gm: fx.GraphModule, branches: tuple[str, ...]) -> list[int]:
    """Positions of the floating-point outputs that reuse of these branches changes."""
    sets = BitSets.of(gm.graph)
    nodes = nodes_by_name(gm)
    below = 0
    for name in cuts_of(gm, branches):
        below |= sets.descendants[sets.index[nodes[name]]]
    outputs = output_of(gm).args[0]
    originals = len(outputs) - len(gm.meta.get(EXTRA_OUTPUTS, ()))  # type: ignore[arg-type]
    return [i for i in float_outputs(gm) if i < originals and below >> sets.index[outputs[i]] & 1]  # type: ignore[index]
