"""Makes PEFT know DR-LoRA as soon as both are imported, and imports PEFT for nobody who did not.

    import drlora                                # puts the finder below in place, and is done
    model = AutoPeftModel.from_pretrained(...)   # `peft` was imported: the method is registered

Importing PEFT takes seconds (torch and transformers come with it), which `drlora --help` must not
cost. Python asks the finders on `sys.meta_path` for every module that is imported for the first
time. Ours finds nothing by itself: it lets the others find `peft` and the modules of this package,
and looks again when such a module has run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Importing these fills the registries of what settings name (drlora.config.registry).
_RULES = ("drlora.ranks.saliency", "drlora.ranks.policies", "drlora.ranks.starts")


def register_with_peft() -> None:
    """Register now if PEFT is imported already, otherwise in the moment that it is."""
    if "peft" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WhenPeftIsThere())


def _register() -> None:
    from drlora.adapter.model import register
    from drlora.report.card import keep_cards

    for module in _RULES:
        import_module(module)
    register()
    keep_cards()


class _WhenPeftIsThere(MetaPathFinder):
    """Registers after the outermost import of `peft` or of a module of ours that imports it.

    Not earlier: what is to be registered may import the very module that is being imported.
    """

    def __init__(self) -> None:
        self._under_way = 0

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders find, made to tell us when it has run; None of other modules."""
        if not (name == "peft" or name.startswith("drlora.")):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._watch(spec.loader)
        return spec

    def _watch(self, loader: Any) -> None:
        run = loader.exec_module

        def run_and_look(module: ModuleType) -> None:
            del loader.exec_module  # of this one module; the loader is as it was
            self._under_way += 1
            try:
                run(module)
            finally:
                self._under_way -= 1
            if not self._under_way and "peft" in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                _register()

        loader.exec_module = run_and_look
