"""Other packages' caching, attached to a model as their documentation says: diffusers' hooks and cache-dit.

A `Peer` is a package's method with settings. `attach` changes a fresh model and returns what is called at each step; a
generation is as many calls as it was told. Nothing of a peer is changed or mended here: where one cannot run on a
model, `attach` or the first call raises, and `NotHere` holds the reason.

Sources: FasterCache, arXiv:2410.19355; PAB, arXiv:2408.12588; TaylorSeer, arXiv:2503.06923; MagCache, arXiv:2506.09045;
FirstBlockCache of ParaAttention, https://github.com/chengzeyi/ParaAttention; cache-dit,
https://github.com/vipshop/cache-dit.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn


class NotHere(RuntimeError):
    """A peer that cannot run on this model, with the reason."""


class Attached:
    """A model with a peer's hooks, called like the model; tells the peer where generations begin."""

    def __init__(self, model: nn.Module, peer: Peer, steps: int) -> None:
        self.model, self.peer, self.steps, self.done = model, peer, steps, 0

    def __call__(self, **inputs: Any) -> Any:
        if self.done == 0:
            self.peer.begin(self.model, self.steps)
        self.done = (self.done + 1) % self.steps
        self.peer.time = float(inputs["timestep"].flatten()[0])
        with self.peer.around_call(self.model):
            return self.model(**inputs)


class Peer(ABC):
    """A method of another package."""

    name: ClassVar[str]
    static: ClassVar[bool] = True
    """Whether what it computes does not depend on the samples."""
    time: float = 0.0
    """Timestep of the call under way, which its own pipeline would keep."""

    def attach(self, model: nn.Module, steps: int, calibrate: Callable[[Any], object]) -> Attached:
        """Attach to `model`.

        Args:
            model: A fresh model in eval mode; it is changed.
            steps: Calls of a generation.
            calibrate: Runs one generation, of calibration seeds, with what it is given.

        Raises: NotHere if the package is missing, or refuses the model.
        """
        try:
            self.prepare(model, steps, calibrate)
        except ImportError as error:
            raise NotHere(f"{self.name}: {error}. Install the extra: pip install 'omnifx[peers]'.") from error
        except (ValueError, RuntimeError, AttributeError, TypeError, KeyError, IndexError) as error:
            raise NotHere(f"{self.name} refuses {type(model).__name__}: {_first_line(error)}") from error
        return Attached(model, self, steps)

    @abstractmethod
    def prepare(self, model: nn.Module, steps: int, calibrate: Callable[[Any], object]) -> None:
        """Attach the package's hooks."""

    def begin(self, model: nn.Module, steps: int) -> None:
        """What its pipeline does before a generation."""

    def around_call(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """What its pipeline does around a call."""
        return contextlib.nullcontext()


class _Hooks(Peer):
    """Those of diffusers. Where the model is no CacheMixin, the functions below that class are used."""

    def begin(self, model: nn.Module, steps: int) -> None:
        from diffusers.hooks import HookRegistry

        HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks(recurse=True)

    def around_call(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        from diffusers.models.cache_utils import CacheMixin

        context: contextlib.AbstractContextManager[None] = CacheMixin.cache_context(model, "cond")  # type: ignore[arg-type]
        return context


@dataclass
class TaylorSeer(_Hooks):
    """Extrapolates the outputs of attentions and MLPs; its default names find nothing in DiT and PixArt."""

    name: ClassVar[str] = "diffusers TaylorSeer"
    interval: int = 2
    order: int = 1
    before: int = 3
    """Steps that are computed first."""

    def prepare(self, model: nn.Module, steps: int, calibrate: Callable[[Any], object]) -> None:
        from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

        config = TaylorSeerCacheConfig(
            cache_interval=self.interval,
            disable_cache_before_step=self.before,
            max_order=self.order,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[r"(temporal_)?transformer_blocks\.\d+\.(attn1|attn2|ff)"],
        )
        apply_taylorseer_cache(model, config)


@dataclass
class FirstBlockCache(_Hooks):
    """Reuses the residual of all later blocks while the first block's changes little."""

    name: ClassVar[str] = "diffusers FirstBlockCache"
    static: ClassVar[bool] = False
    threshold: float = 0.1

    def prepare(self, model: nn.Module, steps: int, calibrate: Callable[[Any], object]) -> None:
        from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

        apply_first_block_cache(model, FirstBlockCacheConfig(threshold=self.threshold))


@dataclass
class PAB(_Hooks):
    """Reuses attention outputs in the middle of the trajectory."""

    name: ClassVar[str] = "diffusers PAB"
    spatial: int = 2
    cross: int = 3

    def prepare(self, model: nn.Module, steps: int, calibrate: Callable[[Any], object]) -> None:
        from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=self.spatial,
            temporal_attention_block_skip_range=self.spatial,
            cross_attention_block_skip_range=self.cross,
            current_timestep_callback=lambda: int(self.time),
        )
        apply_pyramid_attention_broadcast(model, config)


@dataclass
class FasterCache(_Hooks):
    """Mixes old attention outputs, and skips the unconditional half where guidance is one call."""

    name: ClassVar[str] = "diffusers FasterCache"
    attention: int = 2
    unconditional: int = 2
    guided: bool = False
    """Whether a call's batch is [uncond; cond]."""
    tensors: str = "BCHW"

    def prepare(self, model: nn.Module, steps: int, calibrate: Callable[[Any], object]) -> None:
        from diffusers.hooks import FasterCacheConfig, apply_faster_cache

        config = FasterCacheConfig(
            spatial_attention_block_skip_range=self.attention,
            temporal_attention_block_skip_range=self.attention,
            unconditional_batch_skip_range=self.unconditional,
            current_timestep_callback=lambda: int(self.time),
            attention_weight_callback=lambda _module: 0.3,
            tensor_format=self.tensors,
            is_guidance_distilled=not self.guided,
        )
        apply_faster_cache(model, config)


@dataclass
class MagCache(_Hooks):
    """Reuses the residual of all blocks, as often as the magnitudes measured in a calibration run allow."""

    name: ClassVar[str] = "diffusers MagCache"
    threshold: float = 0.06
    max_skip: int = 3
    retention: float = 0.2
    ratios: Sequence[float] = field(default=(), repr=False)

    def prepare(self, model: nn.Module, steps: int, calibrate: Callable[[Any], object]) -> None:
        from diffusers.hooks import HookRegistry, MagCacheConfig, apply_mag_cache

        if not self.ratios:
            apply_mag_cache(model, MagCacheConfig(calibrate=True, num_inference_steps=steps))
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                calibrate(Attached(model, self, steps))
            found = re.search(r"\[[^\[\]]*\d[^\[\]]*\]", printed.getvalue().partition("=...):")[2])
            if found is None:
                raise NotHere(f"{self.name}: its calibration printed no ratios.")
            self.ratios = ast.literal_eval(found[0])
            for module in model.modules():
                if hasattr(module, "_diffusers_hook"):
                    registry = HookRegistry.check_if_exists_or_initialize(module)
                    for name in list(registry.hooks):
                        registry.remove_hook(name, recurse=False)
        config = MagCacheConfig(
            threshold=self.threshold,
            max_skip_steps=self.max_skip,
            retention_ratio=self.retention,
            num_inference_steps=steps,
            mag_ratios=list(self.ratios),
        )
        apply_mag_cache(model, config)
        HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()


@dataclass
class DBCache(Peer):
    """cache-dit: reuses, or extrapolates, the residual of the later blocks while that of the first ones changes little,
    at most so many steps in a row."""

    name: ClassVar[str] = "cache-dit"
    static: ClassVar[bool] = False
    threshold: float = 0.08
    continuous: int = 1
    warmup: int = 2
    first: int = 1
    order: int = 0
    """Of its TaylorSeer; 0 reuses."""

    def prepare(self, model: nn.Module, steps: int, calibrate: Callable[[Any], object]) -> None:
        if importlib.util.find_spec("cache_dit") is None:
            raise ImportError("cache-dit is not installed")
        import cache_dit
        from cache_dit.caching.patch_functors import DiTPatchFunctor

        anyhow: Any = model
        more: dict[str, Any] = {"patch_functor": DiTPatchFunctor()} if type(model).__name__.startswith("DiT") else {}
        adapter = cache_dit.BlockAdapter(
            pipe=None,
            transformer=anyhow,
            blocks=anyhow.transformer_blocks,
            forward_pattern=cache_dit.ForwardPattern.Pattern_3,
            **more,
        )
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=self.first,
            Bn_compute_blocks=0,
            max_warmup_steps=self.warmup,
            max_continuous_cached_steps=self.continuous,
            residual_diff_threshold=self.threshold,
            num_inference_steps=steps,
            enable_separate_cfg=False,
        )
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=self.order) if self.order else None
        cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=calibrator)

    def begin(self, model: nn.Module, steps: int) -> None:
        import cache_dit

        cache_dit.refresh_context(model, num_inference_steps=steps)  # without it, the last generation's residuals stay


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
