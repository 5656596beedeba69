"""The emulation of CUDA finds what is wrong with a kernel, and says where: kernels with one mistake each."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from tests.ops.emulated import SOURCES, build

BAD = Path(__file__).with_name("bad_kernels.cu")
# What must be said of each; LINE stands for a line of the file.
FOUND = {
    "right": "",
    "with_warp_barrier": "",
    "without_barrier": r"race in shared memory: it reads at LINE what thread \d+ of block 0 wrote at LINE",
    "without_warp_barrier": r"race in shared memory: it (reads|writes) at LINE",
    "without_second_barrier": r"race in shared memory: it \w+ at LINE what thread \d+ of block 0 (wrote|read) at LINE",
    "blocks_share_a_word": r"race in global memory: it writes at LINE what thread 0 of block 0 wrote at LINE",
    "past_the_end": r"thread 63 of block 0: it reads (past the end|outside every buffer).* at LINE",
    "far_away": r"it reads outside every buffer of the operation, at LINE",
    "past_shared": r"thread 63 of block 0: an address outside every array in shared memory, at LINE",
    "writes_input": r"it writes to an input, at LINE",
    "forgets_one": r"byte 20 of a result of 256 was never written",
    "reads_unwritten": r"it reads global memory that nothing wrote, at LINE",
    "reads_unwritten_shared": r"it reads shared memory that nothing wrote, at LINE",
    "two_barriers": r"threads of a block wait at two barriers, .*bad_kernels.cu:\d+ and .*bad_kernels.cu:\d+",
    "shuffles_without_all": r"lane \d+ of the mask has ended",
    "waits_for_ever": r"no thread can go on; thread 0 waits at .*bad_kernels.cu:\d+",
    "order_of_atomics": r"another order of threads and blocks leaves other bits",
    "atomic_and_plain": r"race in global memory",
    "not_aligned": r"an address that is not a multiple of 16, at .*types.cuh:\d+",
}


@pytest.fixture(scope="module")
def run():
    library = ctypes.CDLL(str(build([BAD, SOURCES / "emulation/emulation.cpp"], "bad")))
    library.run_case.restype = ctypes.c_char_p
    return lambda name: library.run_case(name.encode()).decode()


@pytest.mark.parametrize("name", FOUND)
def test_it_finds(run, name):
    told = run(name)
    if not FOUND[name]:
        assert told == ""
    assert re.search(FOUND[name].replace("LINE", r"bad_kernels.cu:\d+[^,]*?"), told), told


def test_every_kernel_is_tried():
    assert set(FOUND) == set(re.findall(r"^__global__ void (\w+)", BAD.read_text(), re.MULTILINE))
