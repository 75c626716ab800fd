"""Files of a user's that register rules, for the command line: `--plugin my_rules.py`.

A program of one's own imports such a file itself. The command line runs it before it reads
anything else, in each process of a comparison too. Nothing that a recipe, a run or an adapter holds
can name one: code runs only because its user said so.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from drlora.errors import ConfigError, first_line

_LOADED: dict[str, str] = {}


def load_plugins(paths: Iterable[str]) -> None:
    """Run each file once.

    Raises:
        ConfigError: if there is no such file, or it ends with an error.
    """
    for given in paths:
        path = Path(given).resolve()
        if str(path) in _LOADED:
            continue
        if path.suffix != ".py" or not path.is_file():
            raise ConfigError(f"--plugin {given}: there is no Python file of that name.")
        name = f"drlora_plugin_{path.stem}"
        if name in sys.modules:
            raise ConfigError(
                f"--plugin {given}: another plugin is called {path.stem}; rename one."
            )
        spec = spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[name] = module  # what is defined in it can be pickled
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise ConfigError(f"--plugin {given} failed: {first_line(error)}") from error
        _LOADED[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()


def loaded_plugins() -> dict[str, str]:
    """Absolute path of each file that was run -> SHA-256 of what it held."""
    return dict(_LOADED)


def plugins_for_the_record() -> dict[str, str]:
    """The same with names instead of paths."""
    return {Path(path).name: digest for path, digest in _LOADED.items()}
