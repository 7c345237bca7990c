"""Builds the one compiled part, the BPE engine, with ninja against CPython's limited API.

Everything else about the package stands in pyproject.toml. torch is no build requirement: the extension speaks to
Python only, so one cp311-abi3 wheel serves every Python from 3.11 on and every torch.
"""

import os
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# Free-threaded builds have no limited API yet; they get a version-specific extension.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")
FLAGS = ["-std=c++20", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wpedantic"]
if os.environ.get("FASTFORMER_WERROR") == "1":
    FLAGS.append("-Werror")


class NinjaBuildExt(build_ext):
    """Compile in parallel and only what changed; compilers that are not unix-like take setuptools' own way."""

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            super().build_extension(ext)
            return
        build = Path(self.build_temp, ext.name).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        defines = [f"-D{name}={value}" for name, value in ext.define_macros]
        includes = [f"-I{Path(p).resolve()}" for p in [*ext.include_dirs, sysconfig.get_paths()["include"]]]
        flags = " ".join([*ext.extra_compile_args, *defines, *includes, "-fPIC"])
        shared = "-shared" if sys.platform != "darwin" else "-bundle -undefined dynamic_lookup"
        lines = [
            f"cxx = {os.environ.get('CXX', 'g++' if sys.platform != 'darwin' else 'clang++')}",
            "rule compile",
            f"  command = $cxx -MMD -MF $out.d {flags} $cxxflags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $cxx {shared} $in -o $out {' '.join(ext.extra_link_args)}",
        ]
        objects = []
        for source in ext.sources:
            obj = f"{source.replace('/', '_')}.o"
            lines.append(f"build {obj}: compile {_escape(str(Path(source).resolve()))}")
            objects.append(obj)
        lines += [f"build {_escape(str(target))}: link {' '.join(objects)}", ""]
        (build / "build.ninja").write_text("\n".join(lines))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(build), "--quiet"], check=True)


class AbiWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("cp311", "abi3", platform) if LIMITED_API else (python, abi, platform)


def _escape(path: str) -> str:
    return path.replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


setup(
    # A source distribution holds no link fastformer/kernels, so the kernels are found where they are.
    packages=[
        *find_packages(include=["fastformer", "fastformer.*"], exclude=["fastformer.kernels", "fastformer.kernels.*"]),
        "fastformer.kernels",
        *(f"fastformer.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"fastformer": "fastformer", "fastformer.kernels": "kernels"},
    ext_modules=[
        Extension(
            "fastformer.tokenizer._bpe",
            sources=[*sorted(glob("csrc/bpe/**/*.cpp", recursive=True)), *sorted(glob("csrc/python/*.cpp"))],
            depends=sorted(glob("csrc/**/*.h*", recursive=True)),
            include_dirs=["csrc"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if LIMITED_API else [],
            extra_compile_args=FLAGS if os.name == "posix" else ["/std:c++20", "/O2", "/EHsc"],
            extra_link_args=["-pthread"] if os.name == "posix" else [],
            language="c++",
            py_limited_api=LIMITED_API,
        )
    ],
    cmdclass={"build_ext": NinjaBuildExt, "bdist_wheel": AbiWheel},
)
