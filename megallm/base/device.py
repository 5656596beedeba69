"""What training asks of a device besides arithmetic: memory, time. The only place that names CUDA events."""

from __future__ import annotations

import resource
import time

import torch

GIB = 2**30


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: allocated on a GPU, resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


# Dense bf16 FLOP/s of the chips for which a utilisation is reported, by a word of their name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a known GPU, else None: a utilisation would be a guess."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for word, flops in PEAK_FLOPS.items() if word in name), None)


class Stopwatch:
    """Moments on a device's own time line. On a GPU a mark is an event in the stream: marking never waits.

    Seconds are those of `time.perf_counter`, which all processes of a machine share.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.origin, self.begun = self.mark(), time.perf_counter()

    def mark(self) -> float | torch.cuda.Event:
        """The moment at which everything issued so far is done."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, moment: float | torch.cuda.Event) -> float:
        """When a moment was; on a GPU this waits for it, and the stream's lag at the start is the error."""
        if not self.on_gpu:
            return moment
        moment.synchronize()
        return self.begun + self.origin.elapsed_time(moment) / 1000.0
