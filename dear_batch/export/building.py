"""Builds a plan in a process of its own: `python -m dear_batch.export.building`.

TensorRT looks at no signal for as long as a minute, holds several times the weights, and may
die in native code. A process can be ended at once, gives all memory back, and dies alone. One
line of JSON comes in through stdin, lines of JSON go out through what was stdout: shares that
are done, then what it came to. It ends with its parent, whose end closes stdin.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, NoReturn

from dear_batch.errors import (
    ConfigurationError,
    DearBatchError,
    OutputError,
    TryAgainError,
    bug,
    too_little_memory,
)
from dear_batch.export.tensorrt import Advance, Built, Order, plan_from_onnx
from dear_batch.pointwise.profiles import Profile
from dear_batch.python_command import python_command

Send = Callable[[Mapping[str, Any]], None]

ERRORS = {kind.__name__: kind for kind in (ConfigurationError, OutputError)}
SHOWN_WORDS = 8  # last lines of stderr of a process that died
_KILLED = -9  # from nobody, it is mostly the kernel short of memory
EXIT_S = 5.0
_PERCENT = 100


def built(order: Order, advance: Advance) -> Built:
    """Build a plan as `plan_from_onnx` does. Nothing of it goes on when this is left.

    Raises:
        ConfigurationError, OutputError: as there.
        TryAgainError: there is too little memory, or the process died.
    """
    words = order.plan.with_suffix(".log")
    command = python_command("dear_batch.export.building")
    with (
        words.open("w+b") as stderr,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,  # a terminal's Ctrl-C reaches us alone
        ) as process,
    ):
        try:
            final = _result(process, order, advance)
        finally:
            process.kill()
    if final is None:
        raise _died(order, process.returncode, words)
    return _built(order, final)


def _result(
    process: "subprocess.Popen[bytes]", order: Order, advance: Advance
) -> dict[str, Any] | None:
    """The last line, or None from a process that died before it."""
    if process.stdin is None or process.stdout is None:  # for the type checker: they are pipes
        return None
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(asdict(order), default=str).encode() + b"\n")
        process.stdin.flush()  # and stays open
    for line in process.stdout:
        event: dict[str, Any] = json.loads(line)
        if "share" not in event:
            return event
        advance(event["share"])
    with suppress(subprocess.TimeoutExpired):
        process.wait(EXIT_S)  # so that its own end is seen, not ours
    return None


def _built(order: Order, final: dict[str, Any]) -> Built:
    if "memory" in final:
        raise too_little_memory(f"build a plan for {order.sm}", final["memory"])
    if "bug" in final:
        raise bug(final["bug"])
    if "error" in final:
        raise ERRORS.get(final.pop("error"), DearBatchError)(**final)
    return Built(final["version"], final["seconds"], tuple(final["scratch_bytes"]))


def _died(order: Order, code: int, words: Path) -> TryAgainError:
    lines = words.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_WORDS:]
    return TryAgainError(
        f"The process that built a plan for {order.sm} died ({_how(code)}).",
        where="\n    ".join(lines),
        next_step="run the same command again where there is more memory"
        if code == _KILLED
        else "run the same command again; if it dies again, report it",
    )


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def main() -> NoReturn:
    """Read the order, build, and say what it came to."""
    send = _claim_stdout()
    fields = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_outlive_nobody, daemon=True).start()
    send(_final(_order(fields), send))
    os._exit(0)  # whatever native libraries do while they are unloaded


def _order(fields: dict[str, Any]) -> Order:
    paths = {name: Path(fields[name]) for name in ("graph", "plan", "timings") if fields[name]}
    profiles = tuple(map(Profile.from_json, fields["profiles"]))
    return Order(**{**fields, **paths, "profiles": profiles})


def _final(order: Order, send: Send) -> Mapping[str, Any]:
    told = 0

    def advance(share: float) -> None:
        nonlocal told
        if int(share * _PERCENT) > told:
            told = int(share * _PERCENT)
            send({"share": share})

    try:
        return asdict(plan_from_onnx(order, advance))
    except MemoryError as error:
        return {"memory": str(error)}
    except DearBatchError as error:
        parts = {name: getattr(error, name) for name in ("what", "where", "valid", "next_step")}
        return {"error": type(error).__name__, **parts}
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent must hear of it
        return {"bug": f"{type(error).__name__}: {error}"}


def _claim_stdout() -> Send:
    """Keep stdout for events alone; what native libraries print there goes to stderr."""
    events: IO[bytes] = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    return lambda event: _write(events, json.dumps(event).encode() + b"\n")


def _write(events: IO[bytes], line: bytes) -> None:
    events.write(line)


def _outlive_nobody() -> None:
    """The parent holds the other end of stdin for as long as it lives."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
