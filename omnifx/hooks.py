"""Hooks of other libraries that run Python between the layers of a model: which there are, and what to use instead."""

from __future__ import annotations

from collections import Counter

from torch import nn

_ADVICE = {
    "accelerate": "offload the whole model (pipe.enable_model_cpu_offload())",
    "diffusers": 'offload by blocks (apply_group_offloading(..., offload_type="block_level"))',
    "casting": "quantise the weights (torchao) instead of casting them layer by layer",
}


def hooks_of(model: nn.Module | None) -> str:
    """What hooks of accelerate and diffusers the modules of a model have, and what to do; empty if there are none.

    Those on one module alone are left out: they run before and behind the whole model, and break nothing.
    """
    counts: Counter[str] = Counter()
    advice: dict[str, None] = {}
    for module in model.modules() if model is not None else ():
        if (hook := getattr(module, "_hf_hook", None)) is not None:
            counts[f"accelerate's {type(hook).__name__}"] += 1
            advice[_ADVICE["accelerate"]] = None
        for name in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}):
            counts[f"diffusers' {name}"] += 1
            advice[_ADVICE["casting" if "casting" in name else "diffusers"]] = None
    told = ", ".join(f"{name} on {count} modules" for name, count in counts.most_common() if count > 1)
    return f"Hooks run between its layers: {told}; {', or '.join(advice)}." if told else ""
