"""Read the cuts of reused branches from the cache; what only fed them is dead, and `Eliminate` removes it.

Before:  trunk -> norm -> attention -> proj (the cut) -> mul(gate) -> add(trunk)
After:   cached_proj (an input)                       -> mul(gate) -> add(trunk)
Numerics: bitwise equal when fed this step's own cuts; otherwise approximate, as the plan decides.
"""

from dataclasses import dataclass

from torch import fx

from omnifx.errors import PassError
from omnifx.graph import Pass, insert_input, nodes_by_name
from omnifx.passes.write_cuts import cuts_of, require_branches


@dataclass(frozen=True, kw_only=True)
class ReadCuts(Pass):
    """Replace each cut by an input labelled ``cut:<node name>``."""

    branches: tuple[str, ...]  # names, as MatchReport prints them

    def requires(self, gm: fx.GraphModule) -> None:
        require_branches(self, gm, self.branches)

    def call(self, gm: fx.GraphModule) -> bool:
        nodes = nodes_by_name(gm)
        for name in cuts_of(gm, self.branches):
            cut = nodes[name]
            cached = insert_input(gm, f"cached_{name}", label=f"cut:{name}", like=cut.meta["val"])
            cut.replace_all_uses_with(cached)
        return bool(self.branches)

    def ensures(self, gm: fx.GraphModule) -> None:
        nodes = nodes_by_name(gm)
        if used := [name for name in cuts_of(gm, self.branches) if name in nodes and nodes[name].users]:
            raise PassError(f"{self.name}: the cuts {used} are still used after they were replaced.")
