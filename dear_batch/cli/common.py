"""What every command shares: what a command line must have."""

from collections.abc import Mapping

from dear_batch.errors import UsageError


def need(options: Mapping[str, object]) -> None:
    """Refuse a command line that lacks one of these; the keys are what to call them."""
    missing = [name for name, value in options.items() if not value]
    if missing:
        raise UsageError(
            f"Missing: {', '.join(missing)}.",
            valid=f"a SPEC.toml, or all of: {', '.join(options)}",
            next_step="the same command with --help",
        )
