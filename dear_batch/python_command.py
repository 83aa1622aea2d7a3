"""How a process of this package starts another one."""

import sys
from pathlib import Path


def python_command(module: str) -> list[str]:
    """Runs a module of ours; it imports from where we do.

    From the working directory only if we do: `python -m` puts it first by itself, and a job may
    be run in a folder of anybody's files.
    """
    safe = [] if {"", str(Path.cwd())} & set(sys.path) else ["-P"]
    return [sys.executable, *safe, "-m", module]
