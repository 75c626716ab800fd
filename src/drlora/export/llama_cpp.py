"""llama.cpp's own converters, where they are installed: a model or an adapter to a GGUF file.

They are Python scripts of its source folder, and are looked for in this order:

    LLAMA_CPP=path/to/llama.cpp      the folder
    PATH                             the scripts themselves, as some packages install them
    llama-server on PATH             the folder that it was built in

The scripts of a folder run in this Python, and bring their own `gguf`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from drlora.errors import CheckpointError, ConfigError

FOLDER_VARIABLE = "LLAMA_CPP"
SERVER = "llama-server"
OF_MODELS, OF_ADAPTERS = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
_LINES_OF_ERROR = 3


def find_script(name: str) -> list[str] | None:
    """The command that runs the converter `name`; None if there is none."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder and (Path(folder) / name).is_file():
        return [sys.executable, str(Path(folder) / name)]
    own = shutil.which(name)
    if own:
        return [own]
    server = shutil.which(SERVER)
    for parent in Path(server).resolve().parents if server else ():
        if (parent / name).is_file():
            return [sys.executable, str(parent / name)]
    return None


def script_of(name: str) -> list[str]:
    """The same.

    Raises:
        ConfigError: if there is none.
    """
    found = find_script(name)
    if found is None:
        raise ConfigError(
            f"{name} of llama.cpp is not here: it was looked for in the folder {FOLDER_VARIABLE}, "
            f"on PATH, and around {SERVER}. Name llama.cpp's source folder with {FOLDER_VARIABLE}"
            f"=path/to/llama.cpp, or convert elsewhere: drlora export --format per-expert (or "
            f"merged) has the commands in its README."
        )
    return found


def convert_adapter(folder: Path, base: Path, to: Path) -> None:
    """Write a `per-expert` export as a GGUF file in float32.

    Args:
        folder: with the export.
        base: a folder with the config.json of its base model; no weights are read.
        to: the file to be written.

    Raises:
        ConfigError: if the converter is not here.
        CheckpointError: if it ends with an error.
    """
    _run(OF_ADAPTERS, ["--base", str(base), "--outtype", "f32", "--outfile", str(to), str(folder)])


def convert_model(folder: Path, to: Path, outtype: str = "auto") -> None:
    """Write a model's folder as a GGUF file; raises as `convert_adapter`.

    Args:
        folder: with the model and its tokenizer.
        to: the file to be written.
        outtype: of the weights; `auto` is a 16-bit one, `f32` what they are in.
    """
    _run(OF_MODELS, ["--outtype", outtype, "--outfile", str(to), str(folder)])


def _run(name: str, words: list[str]) -> None:
    done = subprocess.run(
        [*script_of(name), *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        last = [line for line in done.stdout.splitlines() if line.strip()][-_LINES_OF_ERROR:]
        raise CheckpointError(
            f"{name} of llama.cpp ended with code {done.returncode}: {' | '.join(last)}"
        )
