"""Python programs in processes of their own, without each importing torch and transformers.

A fork server imports the third-party libraries once for this process, and forks itself for every
program. Nothing that the tests or an earlier program did is in there, and drlora is not imported.
"""

from __future__ import annotations

import gc
import multiprocessing.forkserver
import os
import runpy
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

_IMPORTED = ["torch", "transformers.trainer", "transformers.models.olmoe.modeling_olmoe", "peft",
             "accelerate", "datasets", "safetensors.torch", "numpy"]  # fmt: skip
_context = multiprocessing.get_context("forkserver")


def start_python(command: list[str], printed: Path, folder: Path | None = None,
                 **environment: str) -> BaseProcess:  # fmt: skip
    """Start `python COMMAND`, a script or `-m` and a module, with arguments.

    Args:
        printed: the file that both output streams go to.
        folder: the working directory.
        environment: variables to set.
    """
    use_own_server()
    process = _context.Process(target=_run, args=(command, printed, folder, environment))
    process.start()
    return process


def start_together(commands: list[list[str]], printed: list[Path],
                   **environment: str) -> list[BaseProcess]:  # fmt: skip
    """Start programs that find each other, as torchrun and accelerate launch start them.

    Args:
        commands: of each process, as for `start_python`.
        printed: of each, the file that both output streams go to.
        environment: variables to set in all of them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, size = str(free.getsockname()[1]), str(len(commands))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    sizes = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return [
        start_python(
            command, file, RANK=str(rank), LOCAL_RANK=str(rank), **sizes, **place, **environment
        )
        for rank, (command, file) in enumerate(zip(commands, printed, strict=True))
    ]


def use_own_server() -> None:
    """End the server that a tested `drlora compare` started, drlora in it: there is only one."""
    server = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    if server._preload_modules != _IMPORTED:
        server._stop()
        server.set_forkserver_preload(_IMPORTED)


def finish(process: BaseProcess, printed: Path, timeout: float = 240) -> str:
    """Wait for a program, which must end well; returns what it printed."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
    said = printed.read_text("utf-8")
    assert process.exitcode == 0, said
    return said


def run_python(command: list[str], printed: Path, folder: Path | None = None,
               **environment: str) -> str:  # fmt: skip
    """Both of these."""
    return finish(start_python(command, printed, folder, **environment), printed)


def _run(
    command: list[str], printed: Path, folder: Path | None, environment: dict[str, str]
) -> None:
    output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    assert "drlora" not in sys.modules
    gc.freeze()  # what was imported stays; no collection of the program looks at it
    os.environ.update(environment)
    if folder is not None:
        os.chdir(folder)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")
