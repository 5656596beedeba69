"""The system calls that model-written code may not make, as a classic BPF program. Pure.

bubblewrap takes away network, files and processes of others; this takes away the kernel interfaces
that need none of these: new processes (RLIMIT_NPROC does not bind root, a fork bomb would), memory
outside RLIMIT_AS, sockets of families that a network namespace does not isolate, and tracing.
"""

from __future__ import annotations

import struct

_ERRNO, _ALLOW, _KILL = 0x00050000, 0x7FFF0000, 0x80000000
_EPERM, _ENOSYS = 1, 38
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data (little endian)
_CLONE_THREAD = 0x00010000
_X32 = 0x40000000  # x86_64 numbers from here on are those of another calling convention

# Machine -> (AUDIT_ARCH, clone, clone3, numbers that fail with EPERM).
MACHINES: dict[str, tuple[int, int, int, dict[str, int]]] = {
    "x86_64": (0xC000003E, 56, 435, {
        "shmget": 29, "socket": 41, "socketpair": 53, "fork": 57, "vfork": 58, "semget": 64, "msgget": 68,
        "ptrace": 101, "personality": 135, "pivot_root": 155, "chroot": 161, "mount": 165, "umount2": 166,
        "init_module": 175, "io_setup": 206, "mq_open": 240, "kexec_load": 246, "add_key": 248,
        "request_key": 249, "keyctl": 250, "unshare": 272, "perf_event_open": 298, "setns": 308,
        "process_vm_readv": 310, "process_vm_writev": 311, "finit_module": 313, "memfd_create": 319, "bpf": 321,
        "userfaultfd": 323, "io_uring_setup": 425, "memfd_secret": 447,
    }),
    "aarch64": (0xC00000B7, 220, 435, {
        "shmget": 194, "socket": 198, "socketpair": 199, "semget": 190, "msgget": 186, "ptrace": 117,
        "personality": 92, "pivot_root": 41, "chroot": 51, "mount": 40, "umount2": 39, "init_module": 105,
        "io_setup": 0, "mq_open": 180, "kexec_load": 104, "add_key": 217, "request_key": 218, "keyctl": 219,
        "unshare": 97, "perf_event_open": 241, "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271,
        "finit_module": 273, "memfd_create": 279, "bpf": 280, "userfaultfd": 282, "io_uring_setup": 425,
        "memfd_secret": 447,
    }),
}  # fmt: skip


def build_filter(machine: str) -> bytes:
    """Returns the filter as the kernel reads it, for `bwrap --seccomp`.

    Threads may be made, processes not. Errors: KeyError for a machine that is not in MACHINES.
    """
    architecture, clone, clone3, refused = MACHINES[machine]
    lines = [
        _line(_LOAD, _ARCHITECTURE),
        _line(_JUMP_EQUAL, architecture, 1, 0),
        _line(_RETURN, _KILL),
        _line(_LOAD, _NUMBER),
        _line(_JUMP_GREATER_EQUAL, _X32, 0, 1),
        _line(_RETURN, _KILL),
        _line(_JUMP_EQUAL, clone3, 0, 1),  # its flags lie in memory: glibc then takes clone
        _line(_RETURN, _ERRNO | _ENOSYS),
    ]
    for number in sorted(refused.values()):
        lines += [_line(_JUMP_EQUAL, number, 0, 1), _line(_RETURN, _ERRNO | _EPERM)]
    lines += [
        _line(_JUMP_EQUAL, clone, 0, 3),
        _line(_LOAD, _FIRST_ARGUMENT),
        _line(_JUMP_SET, _CLONE_THREAD, 1, 0),
        _line(_RETURN, _ERRNO | _EPERM),
        _line(_RETURN, _ALLOW),
    ]
    return b"".join(lines)


def _line(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)
