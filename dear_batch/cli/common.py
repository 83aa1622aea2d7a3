"""What every command shares: what a command line must have, and how it is stopped."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from dear_batch.errors import TryAgainError, UsageError


def need(options: Mapping[str, object]) -> None:
    """Refuse a command line that lacks one of these; the keys are what to call them."""
    missing = [name for name, value in options.items() if not value]
    if missing:
        raise UsageError(
            f"Missing: {', '.join(missing)}.",
            valid=f"a SPEC.toml, or all of: {', '.join(options)}",
            next_step="the same command with --help",
        )


@contextmanager
def stopped_by_interrupts() -> Iterator[None]:
    """End on Ctrl-C as a job does: with a message, and the exit code of what is worth a retry.

    Raises:
        TryAgainError: Ctrl-C came.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise TryAgainError(
            "The command was stopped by Ctrl-C; what was not finished is removed.",
            next_step="run the same command again",
        ) from None
