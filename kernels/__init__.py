"""Triton kernels and their launchers: tensors in, tensors out.

No autograd, no policy and no Python object but tensors and numbers live here; `fastformer.ops` adds those. Importing a
module of this package imports triton, so `fastformer.ops` does it inside the dispatch and never at import time.
"""

if __name__ == "kernels":
    # From the repository's root, `import kernels` finds this folder instead of the PyPI package of that name.
    # transformers imports it just to read its version, so the import itself must work; using it must not.
    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"cannot import {name!r}: this 'kernels' is the source folder of fastformer.kernels, found because the "
            "current folder is fastformer's; for the package 'kernels' from PyPI, run Python from another folder"
        )
