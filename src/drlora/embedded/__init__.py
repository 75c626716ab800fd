"""The model and the tasks that come with drlora, as paths.

embedded.model_folder()        # what `model: embedded` in a recipe stands for
embedded.task_names()          # what may follow `embedded:` in `data.train`
"""

from __future__ import annotations

from pathlib import Path

from drlora.errors import ConfigError

FOLDER = Path(__file__).parent
MODEL_NAME = "embedded"
MODEL_FOLDER = FOLDER / "olmoe-tiny"


def model_folder() -> Path:
    """The folder of the embedded model: config, weights and tokenizer.

    Raises:
        ConfigError: if this installation came without it.
    """
    if not (MODEL_FOLDER / "config.json").is_file():
        raise ConfigError(
            "model='embedded' is not part of this installation (no olmoe-tiny folder in the "
            "package); name a local folder or a model of the hub."
        )
    return MODEL_FOLDER


def task_names() -> list[str]:
    """The embedded tasks, sorted."""
    return sorted(path.parent.name for path in (FOLDER / "tasks").glob("*/train.jsonl"))


def resolve_model(name: str) -> str:
    """`name` as transformers takes it: a folder for `embedded`, otherwise unchanged."""
    return str(model_folder()) if name == MODEL_NAME else name
