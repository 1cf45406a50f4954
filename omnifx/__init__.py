"""omnifx: fast inference of diffusion transformers. It compiles the denoising loop, and reuses across steps what
repeats.

``torch.compile(model, backend="omnicache")`` is all that a user needs; the names below are for those who want to see,
measure or decide more.
"""

__version__ = "0.1.0"

from omnifx.backend import omnicache
from omnifx.calibration import calibrate, make_plan
from omnifx.errors import ConfigError, MatchError, OmnifxError, OmnifxWarning, PlanError, ProfileError
from omnifx.explainer import explain
from omnifx.plan import Plan
from omnifx.policy import Policy
from omnifx.profile import Profile
from omnifx.report import MatchReport
from omnifx.runlog import Stats
from omnifx.session import generation, plans, stats

__all__ = [
    "ConfigError",
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
    "calibrate",
    "explain",
    "generation",
    "make_plan",
    "omnicache",
    "plans",
    "stats",
]
