"""The errors drlora raises for what a user can put right; each message names the way out."""


class DrLoraError(Exception):
    """Base of all errors raised by drlora."""


class ConfigError(DrLoraError, ValueError):
    """A setting, or a pair of settings, that cannot work."""


class DataError(DrLoraError, ValueError):
    """Data that is missing, malformed or not of a known form."""


class SyncError(DrLoraError, RuntimeError):
    """Processes of one run that no longer hold the same ranks or statistics."""


class CheckpointError(DrLoraError, ValueError):
    """A checkpoint or adapter that is missing, incomplete or does not fit the model."""
