"""The folder kernels/ shares its name with a PyPI package that transformers looks for."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_transformers_imports_from_the_repository_root():
    done = run("import kernels; from transformers import BertModel; print(kernels.__file__)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(ROOT / "kernels" / "__init__.py")


def test_using_the_folder_as_the_package_says_what_is_wrong():
    done = run("from kernels import get_kernel")
    assert done.returncode == 1
    assert "source folder of fastformer.kernels" in done.stderr
