"""From a pipeline of diffusers, or the digits DiT, to engines: calibrate, plan, export a bundle, build with TensorRT.

Run: python -m examples.export_tensorrt --out digits-bundle                            (TensorRT-RTX, no GPU needed)
     python -m examples.export_tensorrt --pipeline FOLDER --dtype float16 --prompts prompts.txt --steps 28 --out bundle
     python -m examples.export_tensorrt --pipeline FOLDER ... --target tensorrt --out bundle     (on the GPU's machine)
The same from the command line, with the files that examples.calibrate_and_plan writes:
    omnifx export examples.export_tensorrt:make --plan plans/plan-2x.json --target tensorrt-rtx --out digits-bundle

Then, where the GPU is: pipe.transformer = omnifx.load_bundle("bundle", runtime="tensorrt-rtx").
"""

import argparse
import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

import omnifx
from examples.digits.sampling import sample_dit
from examples.export_onnx import BATCH, make
from omnifx.bench_targets import load_pipeline, pipeline_target, read_prompts
from omnifx.bundle import contents
from omnifx.example_inputs import lively

Generate = Callable[[Any, int], Any]


class _FirstCall(Exception):
    """Ends a generation when its first call has been seen."""


def first_call(model: nn.Module, generate: Generate) -> dict[str, Any]:
    """The arguments of a model's first call in a generation: what an export takes as an example."""
    seen: dict[str, Any] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(module.forward).parameters)
        seen.update(dict(zip(names, args, strict=False)) | kwargs)
        raise _FirstCall

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        generate(model, 0)
    except _FirstCall:
        return seen
    finally:
        hook.remove()
    raise SystemExit(f"the generation never calls {type(model).__name__}")


def digits(steps: int, *, tiny: bool) -> tuple[nn.Module, Generate]:
    """The trained digits DiT, or one of two blocks without training."""
    shape = {"in_channels": 1, "out_channels": 1, "sample_size": 8, "patch_size": 1, "num_layers": 2}
    small: Any = {"num_attention_heads": 2, "attention_head_dim": 16, **shape}
    model = lively(DiTTransformer2DModel(**small)) if tiny else make()[0]

    def generate(way: Any, seed: int) -> Tensor:
        seeds = range(BATCH * seed, BATCH * (seed + 1))
        return sample_dit(way, seeds=seeds, labels=torch.arange(BATCH) % 10, steps=steps)

    return model, generate


def from_pipeline(arguments: argparse.Namespace) -> tuple[nn.Module, Generate, Any]:
    """A pipeline's denoiser, what runs a generation with it, and its scheduler."""
    pipe = load_pipeline(arguments.pipeline, dtype=arguments.dtype)
    prompts = read_prompts(arguments.prompts) if arguments.prompts else ()
    target = pipeline_target(pipe, prompts=prompts, class_labels=arguments.class_labels or (), steps=arguments.steps)
    return target.model, lambda way, seed: target.generate(way, seed, None), pipe.scheduler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", help="a folder of diffusers; without it, the digits DiT")
    parser.add_argument("--dtype", help="of the pipeline, and so of its engines: float16, bfloat16, float32")
    parser.add_argument("--prompts", type=Path, help="a file of prompts, one a line")
    parser.add_argument("--class-labels", type=int, nargs="+", help="for pipelines of classes")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the pipeline's own, 50 for digits")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--speedup", type=float, help="FLOPs uncached over planned")
    parser.add_argument("--target", choices=("tensorrt", "tensorrt-rtx"), default="tensorrt-rtx")
    parser.add_argument("--sm", default="86,89,120", help="tensorrt-rtx: compute capabilities of the GPUs")
    parser.add_argument("--workspace", help="most memory that one layer may use beside its values, such as 4GiB")
    parser.add_argument("--out", type=Path, help="the bundle's folder; without it, it is thrown away")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and few steps")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.steps, arguments.policy = 4, "fora"
    folder = arguments.out or Path(tempfile.mkdtemp()) / "bundle"

    scheduler = None
    if arguments.pipeline:
        model, generate, scheduler = from_pipeline(arguments)
    else:
        model, generate = digits(arguments.steps or 50, tiny=arguments.smoke)
    options = {"lowering": "eager"} if not torch.cuda.is_available() else {}
    profile = omnifx.calibrate(model, generate, policy=arguments.policy, options=options)
    plan = omnifx.make_plan(profile, policy=arguments.policy, speedup=arguments.speedup)
    print(plan)
    example = first_call(model, generate)
    omnifx.export(model, example, plan, folder, profile=profile, scheduler=scheduler)

    capabilities = arguments.sm if arguments.target == "tensorrt-rtx" else ""
    try:
        manifest = omnifx.build_engines(
            folder, arguments.target, compute_capabilities=capabilities, workspace=arguments.workspace
        )
    except omnifx.ExportError as error:
        print(f"the bundle is in {folder}; no engines were built: {error}")
        if arguments.smoke:
            return
        raise SystemExit(1) from error
    print(contents(manifest))
    for name, build in manifest.engines[arguments.target].builds.items():
        if build.layers is not None:
            print(f"{name}: {build.layers.attentions} attentions, {build.layers.matrix_products} matrix products")
    print((folder / "engines" / arguments.target / "commands.txt").read_text(encoding="utf-8"))
    print(f'where the GPU is: omnifx.load_bundle("{folder}", runtime="{arguments.target}")')


if __name__ == "__main__":
    main()
