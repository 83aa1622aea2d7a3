"""What every command shares: the outcome on stdout, and what a command line must have."""

import json
from collections.abc import Mapping
from typing import Any

import click

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


def outcome(fields: Mapping[str, Any]) -> None:
    """Print the JSON object that ends stdout, for programs."""
    click.echo(json.dumps(fields, ensure_ascii=False))
