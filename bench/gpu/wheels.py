"""The folder of wheels that travels to a machine without network: made here, unpacked there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What the tests import beside PyTorch, Triton and numpy, with what that imports.
PACKAGES = (
    "pytest",
    "pytest-xdist",
    "execnet",
    "pluggy",
    "iniconfig",
    "packaging",
    "pygments",
    "hypothesis",
    "sortedcontainers",
    "expecttest",
)
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def use(folder: str | None) -> None:
    """Put the wheels of `folder` to use in this process and those it starts.

    Ours gives the compiled engine of the tokenizer to this tree, whose sources are what is tested; the others are
    unpacked under build/ and stand before what is installed.

    Raises:
        SystemExit: the folder does not exist or holds no wheel.
    """
    if not folder:
        return
    found = sorted(Path(folder).resolve().glob("*.whl"))
    if not found:
        raise SystemExit(f"WHEELS={folder} holds no wheel")
    site = ROOT / "build" / "gpu-site"
    names = "\n".join(path.name for path in found)
    listing = site / "wheels.txt"
    if not listing.exists() or listing.read_text() != names:
        shutil.rmtree(site, ignore_errors=True)
        for path in found:
            with zipfile.ZipFile(path) as wheel:
                if path.name.startswith("fastformer-"):
                    engine = [name for name in wheel.namelist() if name.startswith("fastformer/tokenizer/_bpe")]
                    for name in engine:
                        wheel.extract(name, ROOT)
                else:
                    # A wheel of pure Python or extensions is its own installed form, but for scripts.
                    wheel.extractall(site)
        site.mkdir(parents=True, exist_ok=True)
        listing.write_text(names)
    sys.path.insert(1, str(site))
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(site) not in before:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, before)])


def gather(folder: Path) -> int:
    """Fill `folder` with our wheel and those of PACKAGES for Linux on x86-64 with Python 3.12; needs a network."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.whl"):
        path.unlink()
    # By way of the source distribution, whose folder is clean: build/ here may hold modules that are gone by now.
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    platforms = [part for name in PLATFORMS for part in ("--platform", name)]
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    fetch += ["--python-version", PYTHON, "--implementation", "cp", *platforms, "--dest", str(folder), *PACKAGES]
    for command in (build, fetch):
        status = subprocess.run(command, cwd=ROOT).returncode
        if status:
            return status
    for path in folder.glob("*.tar.gz"):
        path.unlink()
    size = sum(path.stat().st_size for path in folder.glob("*.whl"))
    print(f"{len(list(folder.glob('*.whl')))} wheels, {size / 2**20:.1f} MiB in {folder}")
    return 0
