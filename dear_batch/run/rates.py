"""How fast this machine was lately: tokens a second of a bundle on an engine and a device.

Kept in the user's cache folder, a JSON of a few numbers. It is a help for estimates only: it may
be lost, and whatever is wrong with it is as if there were none.
"""

import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from dear_batch.errors import OutputError
from dear_batch.files.durable import replacing

KEPT = 5  # runs of each key
KEYS = 256  # the latest are kept
Rates = dict[str, list[float]]


def remember(bundle_sha256: str, engine: str, device: str, tokens_per_second: float) -> None:
    """Note the rate of a run that has ended."""
    rates = _read()
    key = _key(bundle_sha256, engine, device)
    latest = [*rates.pop(key, []), round(tokens_per_second, 1)][-KEPT:]
    kept = dict([*rates.items(), (key, latest)][-KEYS:])
    path = _path()
    with suppress(OSError, OutputError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def recall(bundle_sha256: str, engine: str, device: str = "auto") -> float | None:
    """The median rate of the last runs, None where there were none.

    `auto` is the device that was used last.
    """
    rates = _read()
    if device != "auto":
        found = rates.get(_key(bundle_sha256, engine, device))
    else:
        beginning = _key(bundle_sha256, engine, "")
        matching = [rates[key] for key in rates if key.startswith(beginning)]
        found = matching[-1] if matching else None
    return median(found) if found else None


def _key(bundle_sha256: str, engine: str, device: str) -> str:
    # Homes are shared by machines; the number of a GPU says nothing of its speed.
    return "/".join((socket.gethostname(), bundle_sha256, engine, device.partition(":")[0]))


def _path() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "dear-batch" / "rates.json"


def _read() -> Rates:
    try:
        found = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # also without a home
        return {}
    return {k: v for k, v in found.items() if _are_rates(v)} if isinstance(found, dict) else {}


def _are_rates(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(rate, int | float) and rate > 0 for rate in value)
    )
