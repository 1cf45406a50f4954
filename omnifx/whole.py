"""Submodules that Dynamo cannot capture, kept whole: each becomes one opaque operator, which runs them eagerly.

Experts that get as many tokens as a router gives them are Python code which depends on values. A graph break in there
would leave the branch in pieces, none of which can be reused; as one operator it is a branch like any other.

Before:  trunk -> norm -> gate -> (break) -> experts -> (break) -> add(trunk)
After:   trunk -> norm -> omnifx::whole -> add(trunk)
Numerics: bitwise equal to the module; what it really computes is its own `forward`.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo import utils as dynamo
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from omnifx.errors import WholeError
from omnifx.flops import LIGHT_NAMESPACES, OPAQUE_FLOPS, numel

MAX_LOOKS = 4
"""Calls that may run uncompiled to find the modules to keep whole: one for each level that breaks are nested in."""

_OBSERVED = "omnifx looks at what this module computes"
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Matrix products, and the position of their first factor."""


# -- looking -----------------------------------------------------------------------------------------------------------


class _Look(TorchDispatchMode):
    """What a module computes from its inputs: FLOPs, and whether it is one branch without side effects."""

    def __init__(self, inputs: Iterable[Tensor], state: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.attends = False
        self.writes = False
        self.draws = False
        self._data = set(map(_storage, inputs))  # storages that depend on the inputs
        self._trunk = set(self._data)  # those that a residual connection may run through
        self._given = self._data | set(map(_storage, state))

    def is_trunk(self, value: Tensor) -> bool:
        """Whether a value follows from the inputs without any heavy operator."""
        return _storage(value) in self._trunk

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            self.attends |= "attention" in str(func)
            return func(*args, **kwargs)
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        self._see(func, args, kwargs, result)
        return result

    def _see(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        packet, name = func.overloadpacket, func.overloadpacket.__name__
        given, made = _tensors((args, kwargs)), _tensors(result)
        attends = "attention" in name or "attn" in name
        factors = args[_PRODUCTS[name] :][:2] if name in _PRODUCTS else ()
        self.attends |= attends or (len(factors) == 2 and all(_storage(f) in self._data for f in factors))
        self.draws |= torch.Tag.nondeterministic_seeded in func.tags
        if func._schema.is_mutable:
            named = zip(func._schema.arguments, args, strict=False)
            written = [
                *(value for argument, value in named if argument.alias_info and argument.alias_info.is_write),
                *(kwargs[a.name] for a in func._schema.arguments if a.name in kwargs and a.is_out),
            ]
            self.writes |= any(_storage(value) in self._given for value in _tensors(written))
        if packet in flop_registry:
            self.flops += int(flop_registry[packet](*args, **kwargs, out_val=result))
        storages = [_storage(value) for value in made if value.is_floating_point()]
        if any(_storage(value) in self._data for value in given):
            self._data.update(map(_storage, made))
        heavy = attends or packet in flop_registry or func.namespace not in LIGHT_NAMESPACES
        if heavy or name.endswith("_like") or name.startswith("new_"):
            return
        if any(_storage(value) in self._trunk for value in given):
            self._trunk.update(storages)


@dataclass(eq=False)
class Whole:
    """A module that is captured as one operator.

    Attributes:
        module: The module.
        handle: Its number in the operator's arguments.
        like: Which of its tensor arguments the output looks like.
        flops: Of one call, as seen.
        numel: Elements of that call's output.
        original: The module's `forward`, as it was on the instance; None: that of its class.
        forward: What takes its place while the compiled model is called.
    """

    module: weakref.ref[nn.Module]
    handle: int
    like: tuple[int, ...]
    flops: int
    numel: int
    original: Callable[..., Any] | None
    forward: Callable[..., Any]

    def run(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The module's own `forward`, on these arguments."""
        module = self.module()
        if module is None:
            raise WholeError("a module that was kept whole is gone; compile its model anew.")
        return _forward_of(module, self.original)(*args, **kwargs)


class Wholes:
    """The submodules of one model to keep whole: those with a graph break that are a branch without side effects.

    Args:
        model: The module as it was before compilation.
    """

    def __init__(self, model: nn.Module) -> None:
        self.found: dict[nn.Module, Whole] = {}
        self.refused: dict[type[nn.Module], str] = {}
        self._root = weakref.ref(model)
        self._nests: dict[tuple[frozenset[type[nn.Module]], ...], None] = {}  # classes around a break, innermost first
        self._observed: dict[nn.Module, Callable[..., Any] | None] = {}
        self._num_users = 0
        self._num_looks = 0
        self._unseen: set[nn.Module] = set()
        self._given_up = False
        self._aside: dict[nn.Module, tuple[Whole, Callable[..., Any]]] = {}

    @property
    def _model(self) -> nn.Module:
        model = self._root()
        assert model is not None  # it is being called
        return model

    def adopt(self, other: Wholes) -> None:
        """Begin with what was found in another instance of the same class, wherever the modules have equal shapes."""
        self.refused = {**other.refused, **self.refused}
        theirs = {**other.found, **{module: whole for module, (whole, _) in other._aside.items()}}
        model = other._root()
        own = dict(self._model.named_modules())
        for path, module in model.named_modules() if model is not None and theirs else ():
            mine = own.get(path)
            if module not in theirs or mine is None or mine in self.found or mine in self._aside:
                continue
            if type(mine) is type(module) and _shapes(mine) == _shapes(module):
                whole = theirs[module]
                original = self._observed[mine] if mine in self._observed else mine.__dict__.get("forward")
                self.found[mine] = _registered(mine, original, whole.like, whole.flops, whole.numel)
        if other._given_up and not self._given_up:
            self.give_up()

    @property
    def replaces_any(self) -> bool:
        """Whether any module's `forward` is replaced while the compiled model is called."""
        return bool(self.found or self._aside)

    # -- the calls that look -------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Observe the modules with breaks that Dynamo met so far, while a call runs uncompiled."""
        if self._given_up:
            return
        for reason in dynamo.graph_break_reasons:
            if _OBSERVED not in reason.reason and (nest := self._nest_of(reason.user_stack)):
                self._nests[nest] = None
        for module in self._wanted():
            if module not in self._observed and module not in self.found:
                self._observed[module] = module.__dict__.get("forward")
                module.__dict__["forward"] = self._observer(module)

    def end_look(self) -> bool:
        """The call is over; returns whether another one must be looked at before the model can be captured."""
        self._restore(self._observed)
        self._observed.clear()
        self._num_looks += 1
        unseen = {module for module in self._wanted() if module not in self.found}
        changed, self._unseen = unseen != self._unseen, unseen
        return bool(unseen) and changed and self._num_looks < MAX_LOOKS

    def give_up(self) -> None:
        """Keep no module whole from now on: those that were run between the graphs, uncompiled."""
        self._given_up = True
        while self._num_users:
            self.leave()
        self._restore(self._observed)
        self._observed.clear()
        self._nests.clear()
        self._aside = {module: (whole, _aside(whole)) for module, whole in self.found.items()}
        self.found.clear()

    # -- the compiled calls --------------------------------------------------------------------------------------------

    def enter(self) -> None:
        """A compiled call begins: from here on Dynamo sees operators."""
        self._num_users += 1
        if self._num_users == 1:
            for module, (_, forward) in self._stand_ins().items():
                module.__dict__["forward"] = forward

    def leave(self) -> None:
        """A compiled call is over."""
        if self._num_users:
            self._num_users -= 1
            if not self._num_users:
                self._restore({module: original for module, (original, _) in self._stand_ins().items()})

    def paths(self) -> dict[str, str]:
        """Where the modules are, from the model's root on, and their classes."""
        named = self._model.named_modules()
        return {path: type(module).__name__ for path, module in named if module in self.found}

    def codes(self) -> list[CodeType]:
        """What Dynamo may have compiled of these modules when it saw more of them than an operator."""
        return [code for cls in {type(module) for module in self.found} for code in _codes_of(cls)]

    def _stand_ins(self) -> dict[nn.Module, tuple[Callable[..., Any] | None, Callable[..., Any]]]:
        """For each module its own `forward`, if the instance has one, and what takes its place."""
        if self._aside:
            return {module: (whole.original, forward) for module, (whole, forward) in self._aside.items()}
        return {module: (whole.original, whole.forward) for module, whole in self.found.items()}

    # -- details -------------------------------------------------------------------------------------------------------

    def _nest_of(self, stack: Iterable[Any]) -> tuple[frozenset[type[nn.Module]], ...]:
        """The classes of submodules whose code a stack runs through, innermost first."""
        classes = {type(module) for module in self._model.modules() if module is not self._model}
        ranges = [(cls, code) for cls in classes if _is_own(cls) for code in _codes_of(cls)]
        nest: list[frozenset[type[nn.Module]]] = []
        for frame in reversed(list(stack)):
            around = frozenset(
                cls
                for cls, code in ranges
                if code.co_filename == frame.filename and code.co_firstlineno <= frame.lineno <= _last_line(code)
            )
            if around and around not in nest:
                nest.append(around)
        return tuple(nest)

    def _wanted(self) -> list[nn.Module]:
        """The innermost modules around each break that were not refused."""
        classes: set[type[nn.Module]] = set()
        for nest in self._nests:
            classes |= next((level for level in nest if not any(cls in self.refused for cls in level)), frozenset())
        return [module for module in self._model.modules() if type(module) in classes and module is not self._model]

    def _observer(self, module: nn.Module) -> Callable[..., Any]:
        original = module.__dict__.get("forward")

        def observe(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                return _forward_of(module, original)(*args, **kwargs)
            given = _tensors((args, kwargs))
            before = _attributes(module)
            with _Look(given, itertools.chain(module.parameters(), module.buffers())) as look:
                output = _forward_of(module, original)(*args, **kwargs)
            reason = _refusal(look, (args, kwargs), output, changed=before != _attributes(module))
            self._note(module, original, look, given, output, reason)
            return output

        disabled: Callable[..., Any] = torch.compiler.disable(observe, reason=_OBSERVED)
        return disabled

    def _note(
        self,
        module: nn.Module,
        original: Callable[..., Any] | None,
        look: _Look,
        given: list[Tensor],
        output: Any,
        reason: str,
    ) -> None:
        known = self.found.get(module)
        like = tuple(
            i for i, t in enumerate(given) if not reason and _looks(t, output) and (known is None or i in known.like)
        )
        if not like or type(module) in self.refused:
            self.refused.setdefault(type(module), reason or "its output has not the shape and type of an input")
            self.found = {m: whole for m, whole in self.found.items() if type(m) is not type(module)}
        elif known is not None:
            known.like = like
            known.flops = max(known.flops, look.flops)
        else:
            self.found[module] = _registered(module, original, like, look.flops, output.numel())

    @staticmethod
    def _restore(forwards: dict[nn.Module, Callable[..., Any] | None]) -> None:
        for module, forward in forwards.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward


def _refusal(look: _Look, arguments: Any, output: Any, *, changed: bool) -> str:
    """Why a module cannot be one operator; empty if it can."""
    args, kwargs = arguments
    if not isinstance(output, Tensor):
        return "it returns more than a tensor"
    if any(not isinstance(value, Tensor | int | float | None) for value in (*args, *kwargs.values())):
        return "it takes more than tensors and numbers"
    if changed or look.writes:
        return "it writes to what it was given, or to itself"
    if look.draws:
        return "it draws random numbers"
    if look.is_trunk(output):
        return "a residual connection runs through it"
    if look.attends:
        return "it holds an attention"
    return "" if look.flops else "it costs nothing"


# -- the operator ------------------------------------------------------------------------------------------------------

_WHOLES: weakref.WeakValueDictionary[int, Whole] = weakref.WeakValueDictionary()
_HANDLES = itertools.count()


def _registered(
    module: nn.Module, original: Callable[..., Any] | None, like: tuple[int, ...], flops: int, elements: int
) -> Whole:
    handle = next(_HANDLES)
    reference = weakref.ref(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        self: Any = reference()
        if not torch.compiler.is_compiling() or torch.is_grad_enabled():
            return _forward_of(self, original)(*args, **kwargs)
        tensors, integers, floats, layout = [], [], [], []
        for name, value in [*[("", value) for value in args], *kwargs.items()]:
            if isinstance(value, Tensor):
                tensors.append(value)
                layout.append(name + ":tensor")
            elif value is None or isinstance(value, bool):
                layout.append(name + ":" + str(value))
            elif isinstance(value, int):
                integers.append(value)
                layout.append(name + ":integer")
            else:
                floats.append(value)
                layout.append(name + ":float")
        weights = [*self.parameters(), *self.buffers()]
        return torch.ops.omnifx.whole(tensors, weights, integers, floats, handle, ",".join(layout))

    whole = _WHOLES[handle] = Whole(reference, handle, like, flops, elements, original, forward)
    return whole


def _aside(whole: Whole) -> Callable[..., Any]:
    """A module's `forward` that Dynamo leaves alone: pieces of it would be graphs in which nothing can be reused."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return whole.run(args, kwargs)

    disabled: Callable[..., Any] = torch.compiler.disable(forward, reason="omnifx cannot keep this module whole")
    return disabled


@torch.library.custom_op("omnifx::whole", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def whole(
    tensors: list[Tensor], weights: list[Tensor], integers: list[int], floats: list[float], handle: int, layout: str
) -> Tensor:
    """Run a module that is kept whole; `layout` names each argument and says which list it is in."""
    found = _found(handle)
    args, kwargs = _arguments(layout, tensors, integers, floats)
    output = found.run(args, kwargs)
    like = tensors[found.like[0]]
    if not isinstance(output, Tensor) or not _looks(like, output):
        module = type(found.module()).__name__
        made = f"{list(output.shape)}, {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
        raise WholeError(
            f"{module} was kept whole since its output looked like its input {list(like.shape)}, {like.dtype}; now it "
            f"is {made}."
        )
    given = {_storage(value) for value in (*tensors, *weights)}
    return output.clone(memory_format=torch.contiguous_format) if _storage(output) in given else output.contiguous()


@whole.register_fake
def _(
    tensors: list[Tensor], weights: list[Tensor], integers: list[int], floats: list[float], handle: int, layout: str
) -> Tensor:
    like = tensors[_found(handle).like[0]]
    return like.new_empty(like.shape)


def _found(handle: int) -> Whole:
    found = _WHOLES.get(handle)
    if found is None:
        raise WholeError("a module that was kept whole is gone; compile its model anew.")
    return found


def _arguments(
    layout: str, tensors: Sequence[Tensor], integers: Sequence[int], floats: Sequence[float]
) -> tuple[list[Any], dict[str, Any]]:
    lists = {"tensor": iter(tensors), "integer": iter(integers), "float": iter(floats)}
    constants = {"None": None, "True": True, "False": False}
    args, kwargs = [], {}
    for entry in filter(None, layout.split(",")):
        name, _, kind = entry.partition(":")
        value = next(lists[kind]) if kind in lists else constants[kind]
        if name:
            kwargs[name] = value
        else:
            args.append(value)
    return args, kwargs


def _flops(node: fx.Node) -> int:
    """What the module computed when it was looked at, by the number of values it gives now."""
    found = _found(int(node.args[4]))  # type: ignore[arg-type]
    return found.flops * numel(node.meta["val"]) // max(1, found.numel)


OPAQUE_FLOPS[torch.ops.omnifx.whole.default] = _flops


# -- helpers -----------------------------------------------------------------------------------------------------------


def _forward_of(module: Any, original: Callable[..., Any] | None) -> Callable[..., Any]:
    return original if original is not None else type(module).forward.__get__(module)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _storage(value: Tensor) -> StorageWeakRef:
    return StorageWeakRef(value.untyped_storage())


def _looks(like: Tensor, output: Tensor) -> bool:
    return (like.shape, like.dtype, like.device) == (output.shape, output.dtype, output.device)


def _shapes(module: nn.Module) -> list[tuple[torch.Size, torch.dtype]]:
    return [(value.shape, value.dtype) for value in (*module.parameters(), *module.buffers())]


def _attributes(module: nn.Module) -> dict[tuple[int, str], int]:
    """What every submodule holds, by identity."""
    held = [(m, name, value) for m in module.modules() for name, value in m.__dict__.items() if name != "forward"]
    return {(id(m), name): id(value) for m, name, value in held}


def _is_own(cls: type[nn.Module]) -> bool:
    """Whether a class is the author's, rather than one of torch's layers or containers."""
    return not cls.__module__.startswith("torch.")


def _codes_of(cls: type[nn.Module]) -> list[CodeType]:
    """The code of a module class's methods, without those of every module."""
    codes = []
    for base in cls.__mro__:
        if base is nn.Module:
            break
        for function in vars(base).values():
            while function is not None:
                code = getattr(getattr(function, "__func__", function), "__code__", None)
                if isinstance(code, CodeType):
                    codes.append(code)
                function = getattr(function, "__wrapped__", None)
    return codes


def _last_line(code: CodeType) -> int:
    return max((line for _, _, line in code.co_lines() if line), default=code.co_firstlineno)
