"""Every setting of an adapter, checked when it is made; methods are settings by name."""

from drlora.config.adapter import DrLoraConfig

__all__ = ["DrLoraConfig"]
