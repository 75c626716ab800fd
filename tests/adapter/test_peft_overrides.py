"""The methods of PEFT that this package overrides are those that were looked at.

PEFT says nothing when a method that somebody overrides changes. A version that is not in
peft_overrides.json fails here with the names that changed, before it fails anywhere else.
"""

import json

import peft
from peft_overrides import RECORD, overridden


def test_what_is_overridden_is_as_it_was_read():
    known = json.loads(RECORD.read_text("utf-8"))
    now = overridden()
    newest = known.get(peft.__version__) or known[max(known, key=_number)]
    changed = [name for name in {**now, **newest} if now.get(name) != newest.get(name)]
    assert not changed, (
        f"PEFT {peft.__version__} has other versions of {changed} than the one that was looked at, "
        f"or we override more: read what is new, follow it, then run tests/peft_overrides.py"
    )


def test_the_record_is_of_the_methods_that_matter():
    now = overridden()
    assert "peft.tuners.lora.model.LoraModel._create_and_replace" in now and len(now) > 10


def _number(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]
