"""Every error type of omnifx. A message says who refused, what it found, what it expected and what to do next."""


class OmnifxError(Exception):
    """Base of all errors that omnifx raises on purpose."""


class ConfigError(OmnifxError, ValueError):
    """An option, argument or setting is unknown, of the wrong type, or out of its range."""


class PassError(OmnifxError, RuntimeError):
    """A graph pass found that its requirements do not hold, or that it did not do what it promises."""


class MatchError(OmnifxError, RuntimeError):
    """No branch of the captured graph can be cached."""


class ProfileError(OmnifxError, ValueError):
    """A profile file is corrupt, of an unknown format, or was measured on something else."""


class PlanError(OmnifxError, ValueError):
    """A plan file is corrupt, of an unknown format, or does not fit the model it is used with."""


class ResultsError(OmnifxError, ValueError):
    """A folder of results is corrupt, of an unknown format, or inconsistent."""


class CacheError(OmnifxError, RuntimeError):
    """The caches would break their budget, or were asked for values they do not hold."""


class WholeError(OmnifxError, RuntimeError):
    """A module that was kept whole in a graph gave something else than what was seen of it."""


class ExportError(OmnifxError, RuntimeError):
    """A model, plan or target cannot be exported, or what was exported differs from the model."""


class BundleError(OmnifxError, RuntimeError):
    """A bundle is incomplete, altered or of an unknown format, or is called for what it was not made for."""


class OmnifxWarning(UserWarning):
    """Something the user should know: the result is right, but less was reused than asked for."""
