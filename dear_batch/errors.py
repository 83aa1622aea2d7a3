"""Errors with an exit code: what happened, where, what would be valid, what to do next.

Raised anywhere, printed only by `dear_batch.cli`. The exit codes are those of BSD's
sysexits where one fits; schedulers map them (75 is worth a retry, 65 and 78 are not).
Two ends of a job are no errors of a class: 0 and `--empty-exit`.
"""

from typing import ClassVar

EXIT_INCOMPLETE = 3  # done and published, and more was set aside or failed than was allowed


class DearBatchError(Exception):
    """Base of every error that a user can act on.

    Args:
        what: the fault in one sentence.
        where: file, row group, row, qid: whatever finds the place.
        valid: what would have been accepted.
        next_step: the command or change that helps.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", valid: str = "", next_step: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.valid = valid
        self.next_step = next_step

    def __str__(self) -> str:
        """All parts that are known, a line each."""
        labelled = (("where", self.where), ("valid", self.valid), ("next", self.next_step))
        lines = [f"  {label}: {text}" for label, text in labelled if text]
        return "\n".join([self.what, *lines])


class UsageError(DearBatchError):
    """The command line or the spec asks for something impossible."""

    exit_code = 2


class IncompleteError(DearBatchError):
    """The job is done and published, and is less than what was asked for."""

    exit_code = EXIT_INCOMPLETE


class InputError(DearBatchError):
    """The input data cannot be read or breaks the schema."""

    exit_code = 65


class OutputError(DearBatchError):
    """The output cannot be written, or its folder is not ours."""

    exit_code = 73


class TryAgainError(DearBatchError):
    """Nothing is wrong with the job: another run holds the folder, or this one was stopped."""

    exit_code = 75


class TrustError(DearBatchError):
    """A model artefact is not what its manifest says, or could run foreign code."""

    exit_code = 77


class ConfigurationError(DearBatchError):
    """Parts that are fine alone do not fit together, or a needed package is missing."""

    exit_code = 78


class EngineRefusedError(ConfigurationError):
    """An engine that was chosen cannot be loaded here after all; another one may be."""


def too_little_memory(purpose: str, where: str) -> TryAgainError:
    """The error where no smaller step is left to take."""
    return TryAgainError(
        f"There is not enough memory to {purpose}.",
        where=where.strip(),
        next_step="end what else holds memory of the device, then run the same command again; "
        "with a smaller batch_tokens an engine holds less",
    )


def bug(what: object) -> DearBatchError:
    """The error for a fault that is none of the user's."""
    text = f"{type(what).__name__}: {what}" if isinstance(what, Exception) else str(what)
    return DearBatchError(
        f"This is a bug in dear-batch: {text}",
        next_step="report it with the log; 2> dear-batch.log keeps one",
    )


def missing_extra(package: str, extra: str, purpose: str) -> ConfigurationError:
    """The error for a feature whose optional dependency is not installed."""
    return ConfigurationError(
        f"{purpose} needs the package {package!r}, which is not installed.",
        next_step=f"pip install 'dear-batch[{extra}]'",
    )
