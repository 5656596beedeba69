"""Compiles csrc/cuda as C++ against the emulation of CUDA, and runs operations of `megallm.ops` through it.

The library is kept in build/, named by what it was made of.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megallm.ops.kernels import KERNELS, load

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc/cuda"
TORCH = Path(importlib.util.find_spec("torch").origin).parent
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # of setup.py too
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fno-strict-aliasing", "-DMEGALLM_EMULATED", "-Wall", "-Werror",
         "-Wno-unknown-pragmas", f"-I{SOURCES}"]  # fmt: skip
# The compiler tells of each access to memory; the emulation listens (csrc/cuda/emulation/emulation.cpp).
WATCHED = ["-fsanitize=thread", "-fno-threadsafe-statics", "--param", "tsan-instrument-func-entry-exit=0", "-x", "c++"]
# Relative to the largest element.
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def _compile(compiler: str, source: Path, target: Path) -> None:
    words = [TARGET, f"-I{TORCH / 'include'}"] if source.name == "bindings.cpp" else []
    words += WATCHED if source.suffix == ".cu" else []
    done = subprocess.run(
        [compiler, *FLAGS, *words, "-c", str(source), "-o", str(target)], capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def build(sources: Sequence[Path], name: str) -> Path:
    """Returns the library of these sources, compiled when one of csrc/cuda has changed."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("NO g++: THE CUDA KERNELS ARE NOT TESTED")
    files = sorted({*sources, *SOURCES.rglob("*.*uh"), *SOURCES.rglob("*.hpp"), Path(__file__)})
    state = hashlib.sha256(b"".join(file.read_bytes() for file in files) + torch.__version__.encode())
    folder = ROOT / "build/emulated"
    library = folder / f"{name}-{state.hexdigest()[:16]}.so"
    if library.exists():
        return library
    own = folder / f"{name}-{os.getpid()}"
    own.mkdir(parents=True, exist_ok=True)
    objects = [own / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda pair: _compile(compiler, *pair), zip(sources, objects, strict=True)))
    made = own / library.name
    subprocess.run(
        [compiler, "-shared", *map(str, objects), "-o", str(made), f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-ltorch",
         "-lc10", "-ldl"], check=True, timeout=60,
    )  # fmt: skip
    for old in folder.glob(f"{name}-????????????????.so"):
        old.unlink(missing_ok=True)
    made.replace(library)  # at once: several processes may do this
    shutil.rmtree(own)
    return library


@cache
def library() -> object:
    """The operations of csrc/cuda for tensors on a CPU."""
    sources = [*sorted(SOURCES.glob("*.cu")), SOURCES / "bindings.cpp", SOURCES / "emulation/emulation.cpp"]
    return load(build(sources, "kernels"), "megallm_emulated")


@contextmanager
def emulated() -> Iterator[None]:
    """Operations take the kernels, emulated, for tensors on the CPU."""
    KERNELS.loaded["cpu"] = library()
    try:
        yield
    finally:
        del KERNELS.loaded["cpu"]


class Counted:
    """The operations, which notes the names of those that were called."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __getattr__(self, name: str) -> object:
        self.names.append(name)
        return getattr(library(), name)


def placed(x: Tensor, offset: int) -> Tensor:
    """A copy that begins `offset` elements behind an address of 16 bytes; what is around it are not numbers."""
    room = x.new_empty(x.numel() + offset + 16)
    room.view(torch.uint8 if room.element_size() == 1 else torch.int16).fill_(-1 if room.element_size() > 1 else 255)
    room[offset : offset + x.numel()] = x.flatten()
    return room[offset : offset + x.numel()].view(x.shape)


def error(
    function: Callable, inputs: Sequence[Tensor], dtypes: Sequence[torch.dtype], offset: int = 0
) -> tuple[float, list[str]]:
    """Returns the largest error of results and gradients of `function` by kernels in `dtypes`, relative to the
    largest element of the reference in float64; and the names of the kernels' operations.
    """
    given = [placed(x.to(dtype), offset).requires_grad_() for x, dtype in zip(inputs, dtypes, strict=True)]
    exact = [x.detach().double().requires_grad_() for x in given]
    counted = Counted()
    KERNELS.loaded["cpu"] = counted
    try:
        found = _results(function, given)
    finally:
        del KERNELS.loaded["cpu"]
    wanted = _results(function, exact)
    worst = 0.0
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        if other.numel():
            worst = max(worst, float((one.double() - other).abs().max() / other.abs().max().clamp(min=1e-30)))
    return worst, counted.names


def _results(function: Callable, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Results and the gradients of inputs, for upstream gradients that both sides round alike."""
    made = function(*inputs)
    made = made if isinstance(made, tuple) else (made,)
    draw = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=draw, dtype=torch.float64).bfloat16().to(y.dtype) for y in made]
    torch.autograd.backward(made, upstream)
    return [*(y.detach() for y in made), *(x.grad for x in inputs)]
