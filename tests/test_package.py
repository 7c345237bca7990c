"""The wheel: built without torch, audited, installed into an empty environment, used by tests/downstream from there."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ABSENT = ("torch", "triton", "transformers", "numpy")
BUILT = (".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "demo-output", "gpu-results")


def run(*command: str | Path, **options) -> str:
    """A command's standard output; the test fails with everything it printed where it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with the source distribution, and the wheel built from it."""
    # A copy: building must leave nothing in the tree, and nothing built here before must get in.
    source = tmp_path_factory.mktemp("source") / "fastformer"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*BUILT))
    # Building on a machine without PyTorch must work: here importing it fails, whatever the environment holds.
    absent = tmp_path_factory.mktemp("absent")
    for module in ABSENT:
        (absent / f"{module}.py").write_text(f"raise ImportError('building must not import {module}')\n")
    out = tmp_path_factory.mktemp("dist")
    environment = {**os.environ, "PYTHONPATH": str(absent), "FASTFORMER_WERROR": "1"}
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, env=environment)
    return out


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """Python of a fresh environment that holds the wheel; its dependencies come from this one, for they are large."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel)
    (site,) = folder.glob("lib/python*/site-packages")
    # A path line adds the folder without running its own .pth files, so the editable fastformer stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def test_build_requirements_are_light():
    import tomllib

    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert {re.match(r"[\w-]+", name).group() for name in required} == {"setuptools", "ninja"}


def test_wheel_tag(wheel):
    assert re.fullmatch(r"fastformer-[\d.]+\w*-cp311-abi3-\w+\.whl", wheel.name)


def test_wheel_holds_what_it_must(names):
    modules = [path.relative_to(ROOT).as_posix() for path in (ROOT / "fastformer").rglob("*.py")]
    kernels = [f"fastformer/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")]
    missing = [name for name in [*modules, *kernels, "fastformer/py.typed"] if name not in names]
    assert not missing
    assert any(re.fullmatch(r"fastformer/tokenizer/_bpe\.abi3\.so", name) for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_holds_nothing_else(names):
    strays = [n for n in names if not n.startswith("fastformer/") and ".dist-info/" not in n]
    assert not strays
    assert not [n for n in names if n.endswith((".cpp", ".h", ".hpp", ".o", ".pyc"))]
    assert len(names) == len(set(names))


def test_source_distribution_is_complete(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    present = {
        path.relative_to(ROOT).as_posix()
        for folder in ("csrc", "kernels", "fastformer", "tests", "bench", "examples")
        for path in (ROOT / folder).rglob("*.*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".so", ".png", ".pyc")
    }
    # rglob does not follow the link fastformer/kernels, which stands for the folder kernels.
    assert not sorted(present - held)


def test_extension_uses_the_limited_api_only(wheel, tmp_path):
    """Every Python symbol it needs must be declared to a program that asks for the 3.11 limited API."""
    nm, compiler = shutil.which("nm"), shutil.which(os.environ.get("CXX", "g++"))
    if nm is None or compiler is None:
        pytest.skip("needs nm and a C++ compiler")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract("fastformer/tokenizer/_bpe.abi3.so", tmp_path)
    undefined = run(nm, "-D", "--undefined-only", tmp_path / "fastformer/tokenizer/_bpe.abi3.so")
    used = set(re.findall(r"\b_?Py\w+", undefined))
    assert used
    declared: set[str] = set()
    # PY_SSIZE_T_CLEAN gives some functions other names, limited API as well.
    for clean in ("", "#define PY_SSIZE_T_CLEAN\n"):
        header = tmp_path / "limited.h"
        header.write_text(f"{clean}#define Py_LIMITED_API 0x030B0000\n#include <Python.h>\n")
        visible = run(compiler, "-E", f"-I{sysconfig.get_paths()['include']}", header)
        declared.update(re.findall(r"\b_?Py\w+", visible))
    assert "PyList_GetItem" in declared
    assert "PyUnicode_AsUTF8" not in declared, "the headers did not apply the limit: 3.13's additions are visible"
    assert not used - declared


def test_extension_exports_its_entry_point_only(wheel, tmp_path):
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract("fastformer/tokenizer/_bpe.abi3.so", tmp_path)
    defined = run(nm, "-D", "--defined-only", tmp_path / "fastformer/tokenizer/_bpe.abi3.so").splitlines()
    # Weak and unique symbols are the C++ runtime's templates, which every such library shares.
    strong = {line.split()[-1] for line in defined if line.split()[-2] in "TDB"}
    assert strong == {"PyInit__bpe"}


def test_installed_wheel_works(environment, tmp_path):
    """tests/downstream, copied away from the repository and run by the environment that holds only the wheel."""
    project = tmp_path / "project"
    shutil.copytree(ROOT / "tests" / "downstream", project)
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith(("FASTFORMER_", "PYTEST_"))}
    where = run(environment, "-c", "import fastformer; print(fastformer.__file__)", cwd=project, env=clean).strip()
    assert Path(where).is_relative_to(environment.parents[1])
    out = run(environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", project, cwd=project, env=clean)
    assert re.search(r"\d+ passed", out)
    assert "failed" not in out
