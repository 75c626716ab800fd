"""The kinds of experts that can be adapted: the interface of transformers, and the exceptions."""

from __future__ import annotations

from torch import nn

from drlora.moe.families.base import Family, Run
from drlora.moe.families.dbrx import Dbrx
from drlora.moe.families.interface import InterfaceExperts
from drlora.moe.families.jetmoe import JetMoe
from drlora.moe.families.llama4 import Llama4
from drlora.moe.families.longcat_flash import LongcatFlash
from drlora.moe.families.module_list import ModuleListExperts
from drlora.moe.families.step3p7 import Step3p7

__all__ = ["FAMILIES", "Family", "Run", "family_of"]

FAMILIES: tuple[Family, ...] = (
    InterfaceExperts(),
    Dbrx(),
    JetMoe(),
    Llama4(),
    LongcatFlash(),
    ModuleListExperts(),
    Step3p7(),
)


def family_of(module: nn.Module) -> Family | None:
    """The family that recognises `module` as its experts, or None."""
    return next((family for family in FAMILIES if family.recognises(module)), None)
