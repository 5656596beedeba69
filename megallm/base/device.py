"""What training asks of a device besides arithmetic: memory, time. The only place that names CUDA
events.
"""

from __future__ import annotations

import os
import re
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

GIB = 2**30


def peak_memory_gib(device: torch.device) -> float:
    """Returns the most memory held so far: allocated on a GPU, resident set of the process on a
    CPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def memory_use(device: torch.device) -> tuple[int, int]:
    """Returns the bytes that count against the limit of this process's memory, and that limit: of
    the GPU, else the process's own limit where one is set, else the control group's or machine's.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[1]
    status = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
    )
    for kind, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            return int(status[name].split()[0]) * 1024, limit
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            total = min(total, int(Path(path).read_text()))
    return int(status["VmRSS"].split()[0]) * 1024, total


def bytes_refused(error: BaseException) -> int | None:
    """Returns how many bytes an allocation asked for that failed; None for any other error."""
    text = str(error)
    found = re.search(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMG]iB)", text)
    if found is None:
        return 0 if isinstance(error, MemoryError) else None
    unit = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[found[2]]
    return int(float(found[1].rstrip(".")) * unit)


# Dense bf16 FLOP/s of the chips for which a utilisation is reported, by a word of their name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}


def peak_flops(device: torch.device) -> float | None:
    """Returns the dense bf16 peak of a known GPU, else None: a utilisation would be a guess."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for word, flops in PEAK_FLOPS.items() if word in name), None)


class Stopwatch:
    """Moments on a device's own time line. On a GPU a mark is an event in the stream: marking never
    waits.

    Seconds are those of `time.perf_counter`, which all processes of a machine share.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.origin, self.begun = self.mark(), time.perf_counter()

    def mark(self) -> float | torch.cuda.Event:
        """Returns the moment at which everything issued so far is done."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, moment: float | torch.cuda.Event) -> float:
        """Returns when a moment was; on a GPU this waits for it, and the stream's lag at the start
        is the error.
        """
        if not self.on_gpu:
            return moment
        moment.synchronize()
        return self.begun + self.origin.elapsed_time(moment) / 1000.0


def host_zeros(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns zeros in CPU memory that `device` copies from and to beside its computation: pinned
    for a GPU.
    """
    return torch.zeros(numel, dtype=dtype, pin_memory=device.type == "cuda")


class HostCopyStream:
    """Copies to CPU memory and back, beside the computation: on a GPU through pinned memory, on a
    stream of their own.

    On a CPU a copy away is a copy, and one back is nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Start copying; the tensor may be let go of at once."""
        if self.stream is None:
            return tensor.detach().clone()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            host.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(self.stream)
        return host

    def bring(self, tensor: torch.Tensor, host: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start copying into `host`, which is kept (`host_zeros`); calling the result waits and
        returns it.
        """
        if self.stream is None:
            return lambda: host.copy_(tensor)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host.copy_(tensor, non_blocking=True)
            copied = self.stream.record_event()
        tensor.record_stream(self.stream)

        def wait() -> torch.Tensor:
            copied.synchronize()
            return host

        return wait

    def to_device(self, host: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Start copying back; `wait` makes the result usable."""
        if self.stream is None:
            return host, None
        with torch.cuda.stream(self.stream):
            tensor = host.to(self.device, non_blocking=True)
            return tensor, self.stream.record_event()

    def wait(self, tensor: torch.Tensor, copied: torch.cuda.Event | None) -> torch.Tensor:
        """Returns the tensor, for use on the current stream."""
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            tensor.record_stream(current)
        return tensor
