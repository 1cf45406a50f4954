"""What a comparison found: uncached generations against ways to make them cheaper, on the same seeds.

A folder holds ``results.json`` and, for each case that kept samples, ``<case>.safetensors``. `omnifx bench` and
``benchmarks/frontier.py`` write such folders, `omnifx report` draws them. Neither file holds code, nor a path that is
followed.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

import safetensors
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, ValidationError, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor

from omnifx.errors import ResultsError

FORMAT = 1
FILE = "results.json"
_ACRONYMS = ("psnr", "ssim", "lpips", "fid")

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")]
"""What may name a file: no separators, no leading dot."""

Family = Literal["ours", "policy", "peer", "solver", "uncached"]
"""Who made a way: the default of omnifx, another of its policies, another package, the sampler itself (fewer steps,
other solvers), or nobody."""


class Metric(BaseModel):
    """One column of figures."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    unit: str = ""
    better: Literal["higher", "lower"]
    guard: bool = False
    """Whether it only catches broken settings: it does not rank."""
    about: str = ""

    @property
    def label(self) -> str:
        """The name as people write it: PSNR p10 for psnr_p10."""
        words = self.name.replace("_", " ").split()
        return " ".join(word.upper() if word in _ACRONYMS else word for word in words)

    @property
    def heading(self) -> str:
        """The label with the unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label


class Value(BaseModel):
    """A figure with its spread over sets of seeds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: FiniteFloat
    spread: FiniteFloat | None = Field(default=None, ge=0.0)
    """Standard deviation over the sets; None for one set."""
    sets: tuple[FiniteFloat, ...] = ()
    """The figure of each set."""

    @classmethod
    def of(cls, sets: Iterable[float]) -> Value | None:
        """Of the figures of all sets; None if one is not finite (equal images have no PSNR)."""
        values = tuple(sets)
        if not values or not all(map(math.isfinite, values)):
            return None
        spread = statistics.stdev(values) if len(values) > 1 else None
        return cls(mean=statistics.fmean(values), spread=spread, sets=values)


class Timeline(BaseModel):
    """What each step of a generation ran."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: str
    """A letter a step, as `Plan.timeline` has them: F full, r reuse, c corrected reuse, ..."""
    timesteps: tuple[FiniteFloat, ...] = ()
    notes: tuple[str, ...] = ()


class Row(BaseModel):
    """One way at one setting."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    """What a curve is called: rows of one method belong together. A peer's first word is its package."""
    family: Family
    setting: str
    compute: FiniteFloat = Field(ge=0.0)
    """FLOPs of the network over those of the uncached generation."""
    time: FiniteFloat | None = Field(default=None, ge=0.0)
    """Seconds of a generation over those of the uncached one, measured beside it; None if not measured."""
    target: FiniteFloat | None = None
    """The share of compute it was tuned for; None if all of its settings are shown."""
    metrics: dict[str, Value] = {}
    drift: tuple[FiniteFloat, ...] = ()
    """For each step, how far the latents after it are from the uncached ones, over their norm; of one set of seeds."""
    bands: tuple[FiniteFloat, ...] = ()
    """For equal bands of spatial frequency, lowest first: error of the samples over the uncached samples' own amplitude
    there; of one set of seeds."""
    timeline: Timeline | None = None
    samples: Name | None = None
    """Its key in the case's file of samples."""


class Case(BaseModel):
    """One model with one sampler, and all ways that were tried on it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    title: str
    model: str
    sampler: str
    steps: int = Field(ge=1)
    """Steps of the uncached generation."""
    seeds: dict[str, str] = {}
    """Which seeds were used for what, in words: calibration, tuning, report."""
    rows: tuple[Row, ...]
    """The uncached run is the row of family "uncached"."""
    refused: dict[str, str] = {}
    """Ways that cannot run here, with the reason."""
    data_range: FiniteFloat = Field(default=2.0, gt=0.0)
    """Largest possible value of a sample minus the smallest."""
    lowest: FiniteFloat = -1.0
    """Smallest possible value of a sample."""


class Results(BaseModel):
    """All cases of one run, with what a reader needs to repeat it.

    Raises: ResultsError from `load`, if a folder is not usable; it names the field.
    Memory: samples are read only by `samples_of`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    title: str
    environment: dict[str, str | int]
    """Command, date, versions, device."""
    metrics: tuple[Metric, ...]
    cases: tuple[Case, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format} is not known; this omnifx reads format {FORMAT}")
        known = {metric.name for metric in self.metrics}
        for case in self.cases:
            for row in case.rows:
                if unknown := sorted(set(row.metrics) - known):
                    raise ValueError(f"case {case.name}, {row.method}: metrics {unknown} are not listed")
        names = [case.name for case in self.cases]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"cases {repeated} are there more than once")
        return self

    def save(self, folder: str | Path, samples: Mapping[str, Mapping[str, Tensor]] | None = None) -> Path:
        """Write ``results.json``, and for each case of `samples` its file: key of a row -> [N, C, (T,) H, W].

        Returns: The path of ``results.json``.
        """
        into = Path(folder)
        into.mkdir(parents=True, exist_ok=True)
        names = {case.name for case in self.cases}
        for name, tensors in (samples or {}).items():
            if name not in names:
                raise ResultsError(f"Results.save: samples are of case {name!r}, but the cases are {sorted(names)}.")
            save_file({key: value.contiguous() for key, value in tensors.items()}, into / f"{name}.safetensors")
        path = into / FILE
        path.write_text(self.model_dump_json(indent=1, exclude_defaults=True) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Results:
        """Read a folder, or its ``results.json``."""
        path = _file_in(folder)
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ResultsError(f"Results.load: cannot read {path}: {error}.") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole"
            raise ResultsError(
                f"Results.load: {path} is not a file of results: {where}: {first['msg']}. Write it anew with "
                "`omnifx bench`."
            ) from error

    def samples_of(self, folder: str | Path, case: Case) -> dict[str, Tensor]:
        """The samples of a case, by key of its rows: [N, C, (T,) H, W]; empty if none were kept."""
        path = _file_in(folder).parent / f"{case.name}.safetensors"
        if not path.exists():
            return {}
        try:
            return dict(load_file(path))
        except (OSError, safetensors.SafetensorError) as error:
            raise ResultsError(f"Results.samples_of: {path} is corrupt: {error}. Measure it anew.") from error


def name_of(text: str) -> str:
    """`text` as a `Name`: what a file may not be called is replaced."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text).strip("-.") or "case"


def _file_in(folder: str | Path) -> Path:
    path = Path(folder)
    return path / FILE if path.is_dir() else path
