"""csrc/cuda compiled by nvcc, as setup.py does it: for one GPU in every run of the tests, for all in slow ones."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops.emulated import ROOT, SOURCES, TARGET

NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
pytestmark = pytest.mark.skipif(not Path(NVCC).exists(), reason="NO nvcc: THE CUDA KERNELS ARE NOT COMPILED")
SETUP = f"""
import setuptools, sys
setuptools.setup = lambda **given: None
sys.argv = ["setup.py"]
namespace = {{"__file__": {str(ROOT / "setup.py")!r}, "__name__": "setup"}}
exec(compile(open({str(ROOT / "setup.py")!r}).read(), "setup.py", "exec"), namespace)
from pathlib import Path
gpus = namespace["GPUS"] if sys.stdin.read() == "all" else namespace["GPUS"][1:2]
namespace["compile_cuda"](Path("library.so"), Path("objects"), gpus)
"""
# Gives the one function of torch's that only its builds for GPUs have, and says which operations there are then.
LOAD = """
import ctypes, sys, torch
from pathlib import Path
from megallm.base.extension import CUDA_VERSION
from megallm.ops.kernels import load, version_of
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL)
load(Path("library.so"), "megallm_cuda")
assert version_of(Path("library.so")) == CUDA_VERSION
names = {one.name for one in torch._C._jit_get_all_schemas()}
print(*sorted(name for name in names if name.startswith("megallm_cuda::")), sep="\\n")
x = torch.ones(2, 8, device="meta")
torch.ops.megallm_cuda.swiglu(x, None, torch.ones(2, 4, device="meta"))
"""


def build(folder: Path, gpus: str) -> Path:
    done = subprocess.run(
        [sys.executable, "-c", SETUP], cwd=folder, input=gpus, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "library.so"


def listed(library: Path) -> set[tuple[str, int]]:
    """Returns what a library has for which GPU: ("ptx" or "elf", 90), as `cuobjdump --list-ptx --list-elf` lists it.

    A fat binary is a header (magic, version, its size, size of what follows) and entries (kind, version, size of their
    header, size of the rest, ..., at byte 28 the architecture).
    """
    data, found, at = library.read_bytes(), set(), 0
    while (at := data.find(struct.pack("<I", 0xBA55ED50), at)) >= 0:
        header, size = struct.unpack_from("<HQ", data, at + 6)
        entry, end = at + header, at + header + size
        while entry < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, entry)
            found.add(({1: "ptx", 2: "elf"}[kind], struct.unpack_from("<I", data, entry + 28)[0]))
            entry += header + size
        at = end
    return found


@pytest.fixture(scope="module")
def hopper(tmp_path_factory) -> Path:
    """Kept in build/, named by what it was made of: half a minute of a core."""
    files = sorted([ROOT / "setup.py", *(path for path in SOURCES.rglob("*") if path.is_file())])
    state = hashlib.sha256(b"".join(file.read_bytes() for file in files) + torch.__version__.encode()).hexdigest()
    kept = ROOT / f"build/hopper-{state[:16]}.so"
    folder = tmp_path_factory.mktemp("hopper")
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        made = shutil.copy(build(folder, "one"), kept.with_suffix(f".{os.getpid()}"))
        for old in ROOT.glob("build/hopper-????????????????.so"):
            old.unlink(missing_ok=True)
        os.replace(made, kept)
    return Path(shutil.copy(kept, folder / "library.so"))


def test_every_kernel_compiles_for_hopper(hopper):
    assert listed(hopper) == {("elf", 90)}


def test_it_registers_the_operations_that_the_emulation_has(hopper, tmp_path):
    stub, runtime = tmp_path / "stub.so", Path(NVCC).resolve().parents[1] / "lib64/libcudart.so"
    if not runtime.exists():
        runtime = Path("/usr/local/cuda/lib64/libcudart.so")
    (tmp_path / "stub.c").write_text("int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(stub), str(tmp_path / "stub.c")], check=True, timeout=60)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(stub), str(runtime)], cwd=hopper.parent, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    bindings = (SOURCES / "bindings.cpp").read_text()
    assert done.stdout.split() == [
        f"megallm_cuda::{name}" for name in sorted(re.findall(r'm\.impl\("(\w+)"', bindings))
    ]


def test_it_depends_on_no_version_of_torch(hopper):
    """Of torch it uses the stable ABI, C functions only; torch 2.10 has all of them by the target that is set."""
    names = subprocess.run(
        ["nm", "-D", "--undefined-only", str(hopper)], capture_output=True, text=True, check=True
    ).stdout
    used = re.findall(r"U (\S+)", names)
    assert [name for name in used if "c10" in name or "torch" in name and name.startswith("_Z")] == []
    assert any(name.startswith("aoti_torch_") for name in used)
    assert TARGET.removeprefix("-DTORCH_TARGET_VERSION=") in (ROOT / "setup.py").read_text()


def test_what_is_not_cuda_is_refused(tmp_path):
    """The negative control of the build: a mistake in a kernel ends it."""
    (tmp_path / "bad.cu").write_text((SOURCES / "swiglu.cu").read_text().replace("gate.x[i]", "gate.y[i]"))
    done = subprocess.run(
        [NVCC, "-std=c++17", "-gencode", "arch=compute_90a,code=sm_90a", f"-I{SOURCES}", "-c", "bad.cu", "-o", "bad.o"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and 'has no member "y"' in done.stderr


@pytest.mark.slow
def test_all_gpus_and_ptx_for_those_to_come(tmp_path):
    machine_code = {("elf", gpu) for gpu in (80, 90, 100)}
    assert listed(build(tmp_path, "all")) == machine_code | {("ptx", gpu) for gpu in (80, 100)}
