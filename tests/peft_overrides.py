"""Records what of PEFT this package overrides, as it was when it was last looked at.

    PYTHONPATH=src python tests/peft_overrides.py      adds the version that is installed

Run it after PEFT's changes to the named methods have been read and followed.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import pkgutil
from pathlib import Path

import peft

import drlora

RECORD = Path(__file__).with_suffix(".json")
# What drlora.report.card puts a function of its own around.
WRAPPED = (peft.PeftModel.create_or_update_model_card,)


def overridden() -> dict[str, str]:
    """PEFT's method -> a hash of its source, for each that a class of ours has its own of."""
    theirs = [inspect.unwrap(function) for function in WRAPPED]
    found = {f"{f.__module__}.{f.__qualname__}": _hash(inspect.getsource(f)) for f in theirs}
    for module in pkgutil.walk_packages(drlora.__path__, "drlora."):
        if "triton" in module.name or module.name.endswith("__main__"):
            continue
        for own in vars(importlib.import_module(module.name)).values():
            if not inspect.isclass(own) or not own.__module__.startswith("drlora"):
                continue
            for name in vars(own):
                if (source := _source_of_base(own, name)) is not None:
                    place, text = source
                    found[f"{place}.{name}"] = _hash(text)
    return dict(sorted(found.items()))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _source_of_base(own: type, name: str) -> tuple[str, str] | None:
    """(class, source) of the method of PEFT that `own.name` takes the place of."""
    for base in own.__mro__[1:]:
        method = vars(base).get(name)
        method = getattr(method, "__func__", method)
        if inspect.isfunction(method):
            if not base.__module__.startswith("peft"):
                return None
            try:
                return f"{base.__module__}.{base.__qualname__}", inspect.getsource(method)
            except OSError:  # dataclasses made it, here as there
                return None
    return None


def main() -> None:
    """Add the installed version to the record."""
    known = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
    known[peft.__version__] = overridden()
    RECORD.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", "utf-8")
    print(f"{RECORD.name}: {len(known[peft.__version__])} methods of PEFT {peft.__version__}")


if __name__ == "__main__":
    main()
