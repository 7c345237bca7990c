"""Triton kernels and their launchers: tensors in, tensors out.

No autograd, no policy and no Python object but tensors and numbers live here; `fastformer.ops` adds those. Importing
this package imports triton, so `fastformer.ops` does it inside the dispatch and never at import time.
"""

if __name__ == "kernels":
    # From the repository's root, `import kernels` would find this folder instead of the PyPI package of that name.
    raise ImportError(
        "this folder is the source of fastformer.kernels; import it by that name "
        "(if you meant the package 'kernels' from PyPI, run Python from another folder)"
    )
