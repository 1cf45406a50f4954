"""The zoo: all entries by name, and the classes of diffusers that are left out, with the reason."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import diffusers.models.transformers
from diffusers import ModelMixin

from tests.zoo.audio import AUDIO
from tests.zoo.entry import Entry
from tests.zoo.image import IMAGE
from tests.zoo.video import VIDEO

ZOO: dict[str, Entry] = {entry.name: entry for entry in (*IMAGE, *VIDEO, *AUDIO)}

LEFT_OUT: dict[str, str] = {
    "MiniMaxMusic3RVQDepthDecoder": "a language model that predicts codes one by one, not a denoiser.",
    "RFD4ProteinaTransformer": "denoises proteins, from two dozen features of their structure.",
    "SanaWMLTX2RefinerTransformer3DModel": "LTX2VideoTransformer3DModel, which is in the table, for one chunk after "
    "another: it reads keys and values from a cache object that earlier calls fill.",
    "WanAnimate2Transformer3DModel": "reads keys and values from a cache object that an earlier call of another mode "
    "fills.",
}
"""Classes that are not in the zoo, and why."""


def transformer_classes() -> list[str]:
    """All model classes that the installed diffusers defines below `diffusers.models.transformers`, sorted."""
    package = diffusers.models.transformers
    found = set()
    for module in pkgutil.iter_modules(package.__path__):
        members = vars(importlib.import_module(f"{package.__name__}.{module.name}")).values()
        found |= {
            each.__name__
            for each in members
            if inspect.isclass(each) and issubclass(each, ModelMixin) and each.__module__.endswith(f".{module.name}")
        }
    return sorted(found)
