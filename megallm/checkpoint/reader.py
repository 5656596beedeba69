"""The reading half of a checkpoint: which steps a folder has, their manifests, and any box of any
tensor.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from megallm.base import suggest
from megallm.base.errors import CheckpointError
from megallm.base.progress import Progress, quiet
from megallm.checkpoint.io import TORCH_DTYPES, PieceReader, copy_bytes
from megallm.checkpoint.manifest import MANIFEST, MAX_MANIFEST_BYTES, Manifest, decode
from megallm.checkpoint.plan import outside_problem, plan_reads
from megallm.checkpoint.shard_file import read_regular, size_problem
from megallm.parallel.shard import Box

_STEP = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_folders(root: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """Returns all `(step, folder)` under `root`, newest first, valid or not; empty when `root` does
    not exist.
    """
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint folder {root} cannot be read: {error.strerror}."
        ) from error
    matches = (_STEP.fullmatch(name) for name in names)
    return sorted(
        ((int(match[1]), Path(root) / match[0]) for match in matches if match), reverse=True
    )


def load_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Returns the manifest of a step folder; checks it and the kind and size of every file it
    lists.

    Errors: `CheckpointError` that names the first bad file.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: it is not a checkpoint, or its save never finished."
        )
    if path.lstat().st_size > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes.")
    manifest = decode(bytes(read_regular(path, 0, None)), str(path))
    for problem in shard_file_problems(folder, manifest):
        raise CheckpointError(problem)
    return manifest


def shard_file_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yields a sentence for each shard file that is missing, of another size, or no regular
    file.
    """
    for name, record in manifest.files.items():
        try:
            problem = size_problem(os.lstat(folder / name), record.nbytes)
        except OSError as error:
            problem = f"is missing or cannot be read ({error.strerror})"
        if problem is not None:
            first = next(
                (t for t, r in manifest.tensors.items() if any(p.file == name for p in r.pieces)),
                None,
            )
            yield f"{folder / name} {problem}; it holds pieces of {first or 'no tensor'}."


class CheckpointReader:
    """An open checkpoint. Reads any box of any tensor, whatever layout wrote it; every byte's hash
    is checked.

    While it is open, retention on this host does not delete the step. Errors of all methods:
    `CheckpointError`.
    """

    def __init__(self, step_folder: str | os.PathLike[str]) -> None:
        self.folder = Path(step_folder)
        self._lock = _hold(self.folder / MANIFEST)
        try:
            self.manifest = load_manifest(self.folder)
        except CheckpointError:
            self.close()
            raise
        self._pieces = PieceReader(self.folder, self.manifest)

    @property
    def meta(self) -> Any:
        """Returns the JSON value that `save` got."""
        return self.manifest.meta

    @property
    def step(self) -> int:
        return self.manifest.step

    def names(self) -> list[str]:
        return sorted(self.manifest.tensors)

    def info(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Returns full logical shape and stored dtype of a tensor."""
        if name not in self.manifest.tensors:
            hint = suggest.did_you_mean(name, self.manifest.tensors)
            raise CheckpointError(f"{self.folder} holds no tensor named {name}.{hint}")
        record = self.manifest.tensors[name]
        return record.full, TORCH_DTYPES[record.dtype]

    @torch.no_grad()
    def read_into(self, name: str, offset: Sequence[int], tensor: torch.Tensor) -> None:
        """Fill `tensor` with the box at `offset` of the logical tensor `name`; any strides, any
        device.

        The dtype must be the stored one. A piece's hash is checked before any byte of it reaches
        `tensor`.
        """
        full, dtype = self.info(name)
        if tensor.dtype != dtype:
            raise CheckpointError(
                f"Tensor {name} is stored as {dtype}; it cannot be read into {tensor.dtype}."
            )
        target = Box(tuple(offset), tuple(tensor.shape))
        problem = outside_problem(full, target)
        if problem is not None:
            raise CheckpointError(
                f"Tensor {name} of shape {full} cannot be read that way: {problem}."
            )
        pieces = self.manifest.tensors[name].pieces
        for index, source, destination in plan_reads(target, [piece.box for piece in pieces]):
            copy_bytes(tensor[destination], self._pieces.load(name, pieces[index])[source])

    def read(self, name: str) -> torch.Tensor:
        """Returns a whole logical tensor on the CPU, in its stored dtype."""
        full, dtype = self.info(name)
        tensor = torch.empty(full, dtype=dtype)
        self.read_into(name, (0,) * len(full), tensor)
        return tensor

    def problems(
        self,
        rank: int = 0,
        size: int = 1,
        wanted: Callable[[str], bool] = lambda name: True,
        progress: Progress = quiet,
    ) -> Iterator[str]:
        """Read and hash all wanted tensors; a sentence for each damaged piece or header. Not
        collective.

        Rank `rank` of `size` looks at every `size`-th piece and header, so that ranks can share the
        work.
        """
        for file in sorted(self.manifest.files)[rank::size]:
            try:
                self._pieces.check_header(file)
            except CheckpointError as error:
                yield str(error)
        names = [name for name in self.names() if wanted(name)]
        pieces = [(name, piece) for name in names for piece in self.manifest.tensors[name].pieces]
        ours = sorted(pieces, key=lambda item: (item[1].file, item[1].offset))[rank::size]
        for number, (name, piece) in enumerate(ours):
            progress("reading", number, len(ours), "pieces")
            try:
                self._pieces.load(name, piece)
            except CheckpointError as error:
                yield str(error)

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _hold(manifest: Path) -> int:
    """Returns a descriptor with a shared lock on the manifest; -1 when it cannot be opened (loading
    it then says why).
    """
    try:
        fd = os.open(manifest, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return -1
    with suppress(OSError):  # a file system without locks: only pins protect a reader there
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return fd
