"""Return the cuts of computed branches beside the outputs, so that later steps can read them.

Before:  trunk -> norm -> attention -> proj (the cut) -> ... -> output(y)
After:   the same                                        -> output(y, proj)
Numerics: bitwise equal; the graph computes what it did before.
"""

from dataclasses import dataclass

from torch import fx

from omnifx.errors import PassError
from omnifx.graph import Pass, append_output, branches_of, nodes_by_name, output_of


@dataclass(frozen=True, kw_only=True)
class WriteCuts(Pass):
    """Append one output for each cut, labelled ``cut:<node name>``."""

    branches: tuple[str, ...]  # names, as MatchReport prints them

    def requires(self, gm: fx.GraphModule) -> None:
        require_branches(self, gm, self.branches)

    def call(self, gm: fx.GraphModule) -> bool:
        nodes = nodes_by_name(gm)
        for cut in cuts_of(gm, self.branches):
            append_output(gm, nodes[cut], label=f"cut:{cut}")
        return bool(self.branches)

    def ensures(self, gm: fx.GraphModule) -> None:
        returned = {getattr(node, "name", None) for node in output_of(gm).args[0]}  # type: ignore[union-attr]
        if missing := set(cuts_of(gm, self.branches)) - returned:
            raise PassError(f"{self.name}: the cuts {sorted(missing)} are not among the outputs.")


def require_branches(step: Pass, gm: fx.GraphModule, names: tuple[str, ...]) -> None:
    """Raise PassError unless the graph has every branch named."""
    if missing := set(names) - set(branches_of(gm)):
        raise PassError(
            f"{step.name}: the graph has no branches {sorted(missing)}; it has {sorted(branches_of(gm))}. "
            "Choose from that list; if it is empty, run FindBranches first."
        )


def cuts_of(gm: fx.GraphModule, names: tuple[str, ...]) -> tuple[str, ...]:
    """The cuts of these branches in graph order, each once."""
    branches = branches_of(gm)
    return tuple(dict.fromkeys(cut for name in names for cut in branches[name].cuts))
