"""The processes of `peers.py`'s sides, seen from outside: ask, wait, and say why there is none."""

import json
import os
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class NotRunError(Exception):
    """Why a side has no figure."""


@dataclass(frozen=True, slots=True)
class Side:
    """A side: `kind` of peer_sides.py, in that Python.

    `batches` are tried; of them `default` is the package's own choice, timed beside the best one.
    """

    name: str
    kind: str
    python: Path
    model: Path
    precision: str
    batches: tuple[int | None, ...]
    default: int | None = None


class Peer:
    """A side's process."""

    def __init__(self, side: Side, lists: list[Any]) -> None:
        if not side.python.exists():
            raise NotRunError(f"{side.python.parent.parent.name} is not there: make bench")
        threads = str(len(os.sched_getaffinity(0)))
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `end`
        self.process = subprocess.Popen(
            [side.python, HERE / "peer.py", side.kind, side.model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env={**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"},
            text=True,
        )
        loaded = self._ask(lists)
        self.versions, self.load_seconds = loaded["versions"], loaded["load_seconds"]

    def ids(self) -> list[list[int]]:
        """What each pair becomes."""
        ids: list[list[int]] = self._ask({"do": "ids"})["ids"]
        return ids

    def score(self, batch: int | None) -> dict[str, Any]:
        """Scores of all pairs and what they took."""
        return self._ask({"do": "score", "batch": batch})

    def _ask(self, request: Any) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._last_word()}
        if "error" in answer:
            self.end()
            raise NotRunError(answer["error"])
        return answer

    def _last_word(self) -> str:
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines() or ["no word"]
        return f"exit code {self.process.wait()}: {lines[-1][:300]}"

    def end(self) -> None:
        """Let it end."""
        for stream in (self.process.stdin, self.process.stdout):
            with suppress(BrokenPipeError):
                stream.close()
        self.process.wait()
        self.log.close()
