"""omnifx: fast inference of diffusion transformers. It compiles the denoising loop, and reuses across steps what
repeats.

``torch.compile(model, backend="omnicache")`` is all that a user needs; the names below are for those who want to see,
measure or decide more.
"""

__version__ = "0.1.0"

from omnifx.backend import omnicache
from omnifx.bundle_loading import load_bundle
from omnifx.calibration import calibrate, make_plan
from omnifx.engine_building import build_engines
from omnifx.errors import (
    BundleError,
    ConfigError,
    ExportError,
    MatchError,
    OmnifxError,
    OmnifxWarning,
    PlanError,
    ProfileError,
)
from omnifx.explainer import explain
from omnifx.exporter import export
from omnifx.plan import Plan
from omnifx.policy import Policy
from omnifx.profile import Profile
from omnifx.report import MatchReport
from omnifx.runlog import Stats
from omnifx.session import generation, plans, stats
from omnifx.triton_repository import write_triton

__all__ = [
    "BundleError",
    "ConfigError",
    "ExportError",
    "MatchError",
    "MatchReport",
    "OmnifxError",
    "OmnifxWarning",
    "Plan",
    "PlanError",
    "Policy",
    "Profile",
    "ProfileError",
    "Stats",
    "__version__",
    "build_engines",
    "calibrate",
    "explain",
    "export",
    "generation",
    "load_bundle",
    "make_plan",
    "omnicache",
    "plans",
    "stats",
    "write_triton",
]
