"""Fetch the chart library that reports carry into src/drlora/report/vendor: Apache ECharts.

python tools/make_vendor.py

Needs npm. The packages are pinned by version and by the checksum of what is taken from them; a file
that is other than it was is refused. NOTICE names their licences, which are taken along.
"""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
import tempfile
from pathlib import Path

VENDOR = Path(__file__).parents[1] / "src" / "drlora" / "report" / "vendor"
# package@version -> (file in it, file here, sha256)
FILES = [
    (
        "echarts@6.0.0",
        "dist/echarts.min.js",
        "echarts.min.js",
        "baa8dfe7e1d9336b98e8986ba7e20ea15e7cdbea1ef42a59d59478632fa45a1d",
    ),
    (
        "echarts@6.0.0",
        "LICENSE",
        "LICENSE-echarts",
        "634293835b43a6dd2094fa39182a3d9a6b9ca43b7fdb9ac354e8037af2a3093a",
    ),
    (
        "echarts@6.0.0",
        "NOTICE",
        "NOTICE-echarts",
        "dc0d9176413c3d96d0ac40b39b1dbb11e3043b7b010be560f5dfe66bd3774ae1",
    ),
    (
        "echarts@6.0.0",
        "licenses/LICENSE-d3",
        "LICENSE-d3",
        "e1211892da0b0e0585b7aebe8f98c1274fba15bafe47fa1f4ee8a7a502c06304",
    ),
    (
        "zrender@6.0.0",
        "LICENSE",
        "LICENSE-zrender",
        "a681e9d183c72b4af4856935893805eb48c08f0f5a3f260203db7444c20fb98a",
    ),
]


def main() -> None:
    """Fetch, check, write."""
    VENDOR.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        archives = {package: pack(package, Path(folder)) for package in {f[0] for f in FILES}}
        for package, inside, name, checksum in FILES:
            content = read(archives[package], f"package/{inside}")
            found = hashlib.sha256(content).hexdigest()
            if found != checksum:
                raise SystemExit(f"{package} {inside} has sha256 {found}, not {checksum}")
            (VENDOR / name).write_bytes(content)
            print(VENDOR / name)


def pack(package: str, folder: Path) -> Path:
    """The archive of a package, as npm serves it."""
    done = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
    )
    return folder / done.stdout.split()[-1]


def read(archive: Path, name: str) -> bytes:
    """One file of an archive."""
    with tarfile.open(archive) as files:
        file = files.extractfile(name)
        assert file is not None, f"{archive.name} holds no {name}"
        return file.read()


if __name__ == "__main__":
    main()
