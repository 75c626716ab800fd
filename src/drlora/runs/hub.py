"""What to talk to by its name: a folder, `embedded`, or a model or an adapter of the hub."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from drlora.embedded import resolve_model
from drlora.errors import CheckpointError, first_line
from drlora.io.files import home
from drlora.io.places import leads_somewhere
from drlora.runs.sources import Source, find_source

_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # of a model of the hub
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def find_named(name: str, model: str | None = None, trust_remote_code: bool = False) -> Source:
    """What is in a folder, or on the hub under that name; a folder comes first.

    Args:
        name: a run directory, a folder with an adapter or a model, `embedded`, or a name of the
            hub.
        model: the base model, where the adapter does not say or it has moved.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        CheckpointError: if there is nothing of that name, the run is unfinished, or the model is
            not known.
    """
    path = home(resolve_model(name))
    if leads_somewhere(path) or not _NAME.fullmatch(path):
        return find_source(Path(path), model, trust_remote_code)
    try:
        folder = snapshot_download(name, allow_patterns=[*_FILES, "*.py"] if trust_remote_code
                                   else _FILES)  # fmt: skip
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is no folder, and no model or adapter of the hub that can be reached: "
            f"{first_line(error)}. Name a run, a folder with an adapter or a model, or a model of "
            f"the hub."
        ) from error
    found = find_source(Path(folder), model, trust_remote_code)
    return replace(found, model=name) if found.adapter is None else found
