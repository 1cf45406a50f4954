"""Skipped steps of a model in parts: its output is formed at its boundary, of those of computed steps.

A model that is one graph combines outputs in a graph of its own (`omnifx.passes.combine_output`). Where the graph is
broken, no graph sees both latents and output; the boundary does (`omnifx.boundary`), and a step that needs nothing of
the network needs no graph. The rules are those of one graph: what is combined belongs to this stream, was computed by
the planned steps with the present weights, and an unplanned full step leaves it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from omnifx.passes.combine_output import channels_of, combined
from omnifx.plan import reuses
from omnifx.store import FullStep
from omnifx.weights import WeightWatch, plain

if TYPE_CHECKING:
    from omnifx.conductor import Call, Conductor


@dataclass(frozen=True)
class _Form:
    """What a model returns: its one tensor, and what that is wrapped in."""

    spec: pytree.TreeSpec
    others: tuple[Any, ...]
    """All that is no tensor; None where the tensor is."""
    at: int

    def around(self, output: Tensor) -> Any:
        return pytree.tree_unflatten([*self.others[: self.at], output, *self.others[self.at + 1 :]], self.spec)


class Skipper:
    """Keeps outputs and latents of planned full steps, and combines them, for the calls of one kind.

    Args:
        model: The module as it was before compilation.
        conductor: What decides for these calls.
    Memory: an output and the latents for each full step that the plan's history counts, owned by the stream.
    """

    def __init__(self, model: nn.Module, conductor: Conductor) -> None:
        self._conductor = conductor
        self._form: _Form | None = None
        self._channels = 0
        self._num_weights = len(_weights(model))
        self._watch = WeightWatch(range(self._num_weights))
        self._changes_before = 0  # that an earlier watch saw

    def begin(self, model: nn.Module, latents: Tensor | None) -> None:
        """A call begins: look at the weights, if any plan combines outputs."""
        conductor = self._conductor
        if not any(entry.plan.history for entry in conductor.entries):
            return
        weights = _weights(model)
        if len(weights) != self._num_weights:  # adapters came or went
            self._changes_before, self._num_weights = self._changes_before + self._watch.version + 1, len(weights)
            self._watch = WeightWatch(range(len(weights)))
        self._watch.look(weights)
        if latents is not None and not conductor.full_step_bytes:
            conductor.full_step_bytes = 2 * latents.nbytes  # until an output is seen

    def refusal(self, call: Call, latents: Tensor | None) -> str:
        """Why a step that is to be skipped must run instead; empty if it may be skipped."""
        combination, cache = call.combination, call.stream.cache
        assert combination is not None  # the step skips
        if self._form is None or latents is None:
            return "no output of this model was seen yet"
        if not self._conductor.store.holds(call.stream.key):
            return "its caches were evicted to keep cache_budget"
        planned, found = call.full_before[: combination.depth], cache.history[: combination.depth]
        if any(full.weights != self._version(call) for full in found):
            return "the weights changed since the caches were made"
        steps = tuple(full.step for full in found)
        if steps != planned:
            return f"outputs are kept of steps {list(steps)}, but the plan combines those of {list(planned)}"
        return ""

    def skip(self, call: Call, latents: Tensor) -> Any:
        """The output of a step that `refusal` lets pass."""
        combination, history = call.combination, call.stream.cache.history
        assert combination is not None  # there is no refusal
        assert self._form is not None
        past = history[: combination.depth]
        found = combined(
            combination, [full.output for full in past], latents, [full.latents for full in past], self._channels
        )
        return self._form.around(found)

    def learn(self, output: Any, latents: Tensor | None) -> None:
        """See what the model returns: whether it can be combined, and how many bytes are kept of a full step."""
        if latents is None:
            return
        leaves, spec = pytree.tree_flatten(output)
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        conductor = self._conductor
        if len(where) != 1 or not leaves[where[0]].is_floating_point() or not _is_plain(leaves, where[0]):
            conductor.boundary_problem = (
                f"outputs cannot be combined here: a call gives {len(where)} tensors, and maybe objects that hold "
                "some; it must be one, in floating point, in tuples, lists, dictionaries or outputs of diffusers"
            )
            return
        tensor: Tensor = leaves[where[0]]
        channels = channels_of(tensor.shape, latents.shape)
        if channels is None:
            conductor.boundary_problem = (
                f"outputs cannot be combined here: the output {list(tensor.shape)} and the latents "
                f"{list(latents.shape)} differ in more than channels"
            )
            return
        conductor.boundary_problem = ""
        conductor.full_step_bytes = tensor.nbytes + latents.nbytes
        others = tuple(None if i == where[0] else leaf for i, leaf in enumerate(leaves))
        self._form, self._channels = _Form(spec, others, where[0]), channels

    def keep(self, call: Call, output: Any, latents: Tensor | None) -> None:
        """Copy a planned full step's output and latents: callers may overwrite both."""
        stream, store = call.stream, self._conductor.store
        if not stream.history or call.plan is None or reuses(call.row) or call.leaves_alone:
            return
        if self._form is None or latents is None or not store.holds(stream.key):
            return
        tensor: Tensor = pytree.tree_leaves(output)[self._form.at].detach()
        full = FullStep(stream.step, self._version(call), tensor.clone(), latents.detach().clone())
        stream.cache.remember(full, most=stream.history)
        stream.log.peak_cache_bytes = max(stream.log.peak_cache_bytes, store.held_bytes)

    def _version(self, call: Call) -> tuple[int, int]:
        return call.weights, self._changes_before + self._watch.version


def _weights(model: nn.Module) -> list[Any]:
    return plain([*model.parameters(), *model.buffers()])


def _is_plain(leaves: Sequence[Any], at: int) -> bool:
    """Whether all but one of a call's results are values that do not change: other objects may hide tensors."""
    return all(i == at or leaf is None or isinstance(leaf, bool | int | float | str) for i, leaf in enumerate(leaves))
