"""Pictures of plans and of samples, for people who would rather look than read.

Colours are those of Okabe and Ito, told apart with every common colour blindness, and never the only sign: marks and
hatches differ too. Figures are made without pyplot, so that nothing global changes and nothing needs a display.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from omnifx.errors import ConfigError
from omnifx.plan import COMPUTE, PREDICT, SKIP, Plan, partial_tokens, reuses
from omnifx.policies.omnicache import OmniCache
from omnifx.profile import Profile

DPI = 160
WIDTH = 10.0  # inches: 1600 pixels

_INK = "#222222"
_PALE = "#8a8a8a"


@dataclass(frozen=True)
class _Look:
    label: str
    colour: str
    marker: str
    hatch: str


_LOOKS = {
    "full": _Look("full: everything computed", "#0072B2", "o", ""),
    "reuse": _Look("reuse", "#E69F00", "s", "////"),
    "predict": _Look("prediction from stored values", "#56B4E9", "v", "...."),
    "corrected": _Look("reuse, output corrected", "#009E73", "^", "\\\\\\\\"),
    "mixed": _Look("some branches reused", "#CC79A7", "D", "xxxx"),
    "combined": _Look("reuse, combined with older outputs", "#D55E00", "P", "++++"),
    "skip": _Look("skipped: older outputs combined", "#F0E442", "X", "----"),
}


def kinds_of_steps(plan: Plan) -> list[str]:
    """What each step of a plan does: "full", "reuse", "predict", "corrected" (either with a correction), "mixed"
    (some branches or tokens are computed), "combined" (a reuse with a combination) or "skip"."""
    kinds = []
    for step, row in zip(plan.steps, plan.rows, strict=True):
        if not reuses(row):
            kinds.append("full")
        elif COMPUTE in row or any(map(partial_tokens, row)):
            kinds.append("mixed")
        elif step.combination is not None:
            kinds.append("skip" if SKIP in row else "combined")
        elif step.correction is not None:
            kinds.append("corrected")
        else:
            kinds.append("predict" if PREDICT in row else "reuse")
    return kinds


def plan_figure(plan: Plan, profile: Profile | None = None) -> Figure:
    """A plan as a timeline, under the curvature of the trajectory it was made for.

    Args:
        plan: Any plan.
        profile: What it was made from; without it there is no curvature, only the timeline.

    Returns: A figure 1600 pixels wide.
    Raises: ConfigError if the profile has other steps than the plan.
    """
    if profile is not None and profile.meta.timesteps != plan.timesteps:
        raise ConfigError(
            f"plan_figure: the plan has {len(plan.timesteps)} steps from {plan.timesteps[0]:g}, the profile "
            f"{profile.num_steps} from {profile.meta.timesteps[0]:g}. Give the profile that the plan was made from."
        )
    kinds = kinds_of_steps(plan)
    figure = _figure(5.0 if profile is not None else 2.1)
    heights, rows = ([1.0, 0.16], 2) if profile is not None else ([1.0], 1)
    grid = figure.add_gridspec(rows, 1, height_ratios=heights, hspace=0.06)
    strip = figure.add_subplot(grid[rows - 1])
    _draw_strip(strip, kinds)
    top = strip
    if profile is not None:
        top = figure.add_subplot(grid[0], sharex=strip)
        _draw_curvature(top, kinds, _bend(plan, profile))
        top.tick_params(labelbottom=False, bottom=False)
    _draw_timesteps(top, plan.timesteps)
    seen = dict.fromkeys(kind for kind in _LOOKS if kind in kinds)
    counts = {kind: kinds.count(kind) for kind in seen}
    handles: list[Any] = [
        Patch(
            facecolor=_LOOKS[kind].colour,
            hatch=_LOOKS[kind].hatch,
            edgecolor="white",
            label=f"{_LOOKS[kind].label} ({counts[kind]})",
        )
        for kind in seen
    ]
    if profile is not None:
        handles.append(Line2D([], [], color=_INK, lw=1.4, label="curvature"))
    figure.suptitle(
        f"{plan.model}, policy {plan.policy}: {len(kinds)} steps, {plan.num_reuse_steps} reuse, "
        f"{plan.speedup:.2f}x fewer FLOPs",
        fontsize=13,
        color=_INK,
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=10.5)
    return figure


@dataclass(frozen=True)
class Samples:
    """One set of samples, [N, C, H, W] with C of 1 or 3, and what to write above it."""

    title: str
    images: Tensor


def samples_figure(
    reference: Samples, others: Sequence[Samples], *, amplify: float | None = None, columns: int = 5, most: int = 20
) -> Figure:
    """Samples side by side: the reference, and each other set with its difference from the reference.

    Args:
        reference: The uncached samples, in [-1, 1].
        others: Sets of the same seeds.
        amplify: What differences are multiplied by before they are shown, the same for all sets; None: 1, 2, 5, 10, 20
        or 50, the
            largest that keeps 99% of the first set's difference in range.
        columns: Images in a row of a panel.
        most: Images shown of each set, the first ones.

    Returns: A figure 1600 pixels wide or wider, 290 pixels for each panel.
    Raises: ConfigError if the sets differ in shape.
    """
    for other in others:
        if other.images.shape != reference.images.shape:
            raise ConfigError(
                f"samples_figure: {other.title!r} has shape {list(other.images.shape)}, the reference "
                f"{list(reference.images.shape)}. Generate both with the same seeds."
            )
    shown = min(most, len(reference.images))
    base = reference.images[:shown].detach().float().cpu()
    differences = [other.images[:shown].detach().float().cpu() - base for other in others]
    factor = amplify if amplify is not None else _amplification(differences)
    panels: list[tuple[str, Tensor, bool]] = [(reference.title, base, False)]
    for other, difference in zip(others, differences, strict=True):
        panels.append((other.title, other.images[:shown].detach().float().cpu(), False))
        panels.append((f"difference from uncached\namplified {factor:g}x", difference * factor, True))
    rows = -(-shown // columns)
    width = max(WIDTH, 2.6 * len(panels))
    panel_width = (width - 1.9) / len(panels)
    figure = _figure(panel_width * rows / columns + 0.75, width, gap=0.06)
    axes = [figure.add_subplot(1, len(panels), i + 1) for i in range(len(panels))]
    picture: Any = None
    for axis, (title, images, signed) in zip(axes, panels, strict=True):
        tiled = _tiled(images, columns, fill=float("nan"))
        colours = "RdBu_r" if signed else "gray"
        drawn = axis.imshow(_displayable(tiled), cmap=colours, vmin=-1, vmax=1, interpolation="nearest")
        picture = drawn if signed else picture
        axis.set_title(title, fontsize=11.5, color=_INK)
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
    if picture is not None and reference.images.shape[1] == 1:
        bar = figure.colorbar(picture, ax=axes, shrink=0.75, pad=0.01, aspect=30)
        bar.set_ticks([-1, 0, 1], labels=[f"{-1 / factor:g}", "0", f"+{1 / factor:g}"])
        bar.set_label("difference\n(images: -1 to 1)", fontsize=10)
    return figure


def save_figure(figure: Figure, path: str | Path, *, dpi: int = DPI) -> Path:
    """Write a figure as a picture, with so many pixels an inch; its folder must exist.

    Raises: ConfigError if the file cannot be written, or its ending names no format.
    """
    path = Path(path)
    try:
        figure.savefig(path, dpi=dpi, facecolor="white")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the picture {path} could not be written: {error}. Choose a path ending in .png, .svg or .pdf."
        ) from error
    return path


def _figure(height: float, width: float = WIDTH, gap: float = 0.02) -> Figure:
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(wspace=gap))
    FigureCanvasAgg(figure)
    return figure


def _bend(plan: Plan, profile: Profile) -> Tensor:
    options = plan.policy_options if plan.policy == OmniCache.name else {}
    return OmniCache(**options).bend(profile)


def _draw_strip(axis: Axes, kinds: Sequence[str]) -> None:
    for step, kind in enumerate(kinds):
        look = _LOOKS[kind]
        axis.add_patch(
            Rectangle((step - 0.5, 0), 1, 1, facecolor=look.colour, hatch=look.hatch, edgecolor="white", linewidth=1.0)
        )
    axis.set_xlim(-0.5, len(kinds) - 0.5)
    axis.set_ylim(0, 1)
    axis.set_yticks([])
    axis.set_xlabel("step", fontsize=11)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    for side in ("left", "right", "top"):
        axis.spines[side].set_visible(False)


def _draw_curvature(axis: Axes, kinds: Sequence[str], bend: Tensor) -> None:
    steps = list(range(len(kinds)))
    values = bend.tolist()
    for step, kind in enumerate(kinds):
        if kind != "full":
            axis.axvspan(step - 0.5, step + 0.5, color=_LOOKS[kind].colour, alpha=0.16, lw=0)
    axis.plot(steps, values, color=_INK, lw=1.4, zorder=3)
    for kind, look in _LOOKS.items():
        at = [step for step in steps if kinds[step] == kind]
        if at:
            axis.scatter(
                at,
                [values[i] for i in at],
                s=46,
                marker=look.marker,
                color=look.colour,
                edgecolor="white",
                lw=0.8,
                zorder=4,
            )
    axis.set_ylabel("curvature x path length\n(how sharply the latents' path turns)", fontsize=11)
    axis.set_ylim(0, 1.12 * max(max(values), 1e-9))
    axis.grid(axis="y", color="#e4e4e4", lw=0.8, zorder=0)
    axis.set_axisbelow(True)
    for side in ("right", "top"):
        axis.spines[side].set_visible(False)


def _draw_timesteps(axis: Axes, timesteps: Sequence[float]) -> None:
    count = len(timesteps)
    stride = max(1, -(-count // 10))
    at = list(range(0, count, stride))
    top = axis.secondary_xaxis("top")
    top.set_xticks(at, labels=[f"{timesteps[i]:.4g}" for i in at], color=_PALE)
    top.set_xlabel("timestep, as the model sees it", fontsize=11, color=_PALE)
    top.tick_params(color=_PALE)
    top.spines["top"].set_color("#cccccc")


def _amplification(differences: Sequence[Tensor]) -> float:
    if not differences or not differences[0].numel():
        return 1.0
    large = float(torch.quantile(differences[0].abs().flatten()[:1_000_000], 0.99))
    return float(max((factor for factor in (1, 2, 5, 10, 20, 50) if factor * large <= 1.0), default=1))


def _tiled(images: Tensor, columns: int, *, fill: float) -> Tensor:
    """Images [N, C, H, W] as one [C, rows (H + 1) - 1, columns (W + 1) - 1], a line of `fill` between them."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    out = images.new_full((channels, rows * (height + 1) - 1, columns * (width + 1) - 1), fill)
    for i, image in enumerate(images):
        y, x = (i // columns) * (height + 1), (i % columns) * (width + 1)
        out[:, y : y + height, x : x + width] = image
    return out


def _displayable(image_CHW: Tensor) -> Any:
    if image_CHW.shape[0] == 1:
        return image_CHW[0].numpy()
    colour = ((image_CHW[:3] + 1) / 2).clamp(0, 1).nan_to_num(1.0)
    return colour.permute(1, 2, 0).numpy()
