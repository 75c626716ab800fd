"""Adds `DRLORA` to PEFT's closed list of methods, and a word when an adapter is saved.

PEFT registers methods through `register_peft_method`, but only names that are members of its
`PeftType` enumeration. The member is added here, through the enumeration's private maps, once, at
import. Tried with PEFT 0.21.2 on Python 3.11; tests/adapter/test_peft.py notices when it stops
working.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import PeftConfig, PeftType

_NAME = "DRLORA"


def _add_member() -> PeftType:
    if _NAME in PeftType.__members__:
        return PeftType[_NAME]
    member = str.__new__(PeftType, _NAME)
    member._name_ = _NAME
    member._value_ = _NAME
    member.__dict__["_sort_order_"] = len(PeftType._member_names_)
    PeftType._member_names_.append(_NAME)
    PeftType._member_map_[_NAME] = member
    PeftType._value2member_map_[_NAME] = member
    # From Python 3.12 on members are plain class attributes; the metaclass guards assignment.
    type.__setattr__(PeftType, _NAME, member)
    return member


DRLORA = _add_member()


AFTER_SAVE: list[Callable[[str], None]] = []
"""Called with the folder of an adapter that has just been saved; model cards are written so."""


class SavedConfig(PeftConfig):
    """A configuration that says when its adapter was saved: PEFT saves it last of all."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT does, with AFTER_SAVE called at the end of saving a model.

        PEFT hands `auto_mapping_dict` over, set or None, only when it saves a model.
        """
        of_model = "auto_mapping_dict" in kwargs
        super().save_pretrained(save_directory, **kwargs)
        for act in AFTER_SAVE if of_model else ():
            act(save_directory)
