"""The version, where everything can read it without importing the rest."""

__version__ = "0.2.0.dev0"
