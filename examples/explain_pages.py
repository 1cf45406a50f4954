"""Explain four models at the sizes they are published in, each as a page to look at: no weights, no memory, no GPU."""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import omnifx
from omnifx.example_inputs import build_model, example_inputs


class Published(NamedTuple):
    """A model as it is published, and what it is given."""

    cls: str
    config: dict[str, Any] | None  # of its constructor, beside its own defaults; None: as `omnifx explain` builds it
    what: str


MODELS = {
    "flux": Published("FluxTransformer2DModel", {"guidance_embeds": True}, "FLUX.1-dev, 1024 x 1024 pixels"),
    "sd3": Published(
        "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
        "Stable Diffusion 3 medium, 1024 x 1024 pixels",
    ),
    "wan": Published(
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        "Wan 2.1 1.3B, 81 frames of 480 x 832 pixels",
    ),
    "hidream": Published("HiDreamImageTransformer2DModel", None, "HiDream-I1, 1024 x 1024 pixels"),
}
TINY = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 128}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the pages; by default one that is removed again")
    parser.add_argument("--smoke", action="store_true", help="one model, two blocks: seconds")
    arguments = parser.parse_args()

    diffusers.utils.logging.set_verbosity_error()  # of layers better left in float32: nothing is computed here
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        for name in ["wan"] if arguments.smoke else MODELS:
            start = time.perf_counter()
            path = page(name, out, smoke=arguments.smoke)
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB in {time.perf_counter() - start:.0f} s")


def page(name: str, out: Path, *, smoke: bool) -> Path:
    cls, config, what = MODELS[name]
    if smoke:
        config, what = TINY, f"{what}, but two blocks only"
    model = build_model(cls, config).to(torch.bfloat16)
    inputs = tree_map_only(
        Tensor, lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t, example_inputs(model)
    )

    report = omnifx.explain(model, **inputs)

    torch._dynamo.reset()
    note = f"{what}, one sample, bfloat16; shapes only, no weights"
    return replace(report, notes=(note, *report.notes)).save_html(out / f"{name}.html")


if __name__ == "__main__":
    main()
