"""One exception per exit code; the message is a sentence that says what, where and what to do."""


class MegallmError(Exception):
    """Base of every error megallm raises on purpose; `exit_code` is what the process returns."""

    exit_code = 70


class UsageError(MegallmError):
    """The command line, the configuration or the layout cannot be used."""

    exit_code = 2


class OutOfMemory(UsageError):
    """The configuration needs more memory than a rank has."""


class DataError(MegallmError):
    """A corpus, a dataset or a prompt file is missing or bad."""

    exit_code = 65


class RewardError(MegallmError):
    """A reward function raised, hung, died or returned no reward for a sample."""

    exit_code = 65


class PeerLost(MegallmError):
    """Another rank of this job died or cannot be reached."""

    exit_code = 69


class InternalError(MegallmError):
    """A promise of megallm itself was broken."""

    exit_code = 70


class CannotWrite(MegallmError):
    """An output cannot be written: no space, no permission, a read-only file system."""

    exit_code = 73


class LeaseLost(CannotWrite):
    """Another job took the run folder over: this one writes nothing more."""


class CheckpointError(MegallmError):
    """A checkpoint is missing, incomplete or does not match its hashes."""

    exit_code = 74


class NewerCheckpoint(CheckpointError):
    """A checkpoint of a later megallm: whole, and not for this one to pass over or rename."""


class Requeue(MegallmError):
    """The job was asked to stop, its state is safe, and it may be queued again."""

    exit_code = 75


class Hang(MegallmError):
    """A rank made no progress for longer than the limit."""

    exit_code = 76


class Diverged(MegallmError):
    """The loss or the gradients are not finite."""

    exit_code = 77


class BadStep(Diverged):
    """A step that the run's policy does not go over; the state before it is sound."""


class RollBack(MegallmError):
    """The run goes back to an earlier checkpoint; started again, it goes on from there."""

    exit_code = 75
