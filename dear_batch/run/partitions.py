"""Inputs in folders such as `dt=2026-11-23`: which of them lie in an interval, each a job.

An output folder is named after a time that was parsed and written anew, never after what a path
held. Knows nothing of what is in the files.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from os.path import normpath
from pathlib import Path, PurePath

from dear_batch.errors import UsageError
from dear_batch.run.plan import expand
from dear_batch.specs import JobSpec

VALID = "2026-11-23, 2026-11-23T05 or 2026-11-23T05:30"
_COMPONENT = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]{0,63})=(?P<value>.+)")
# A zone is refused: partitions are compared as they are written, and most are without one.
_TIME = re.compile(r"(\d{4})-(\d\d)-(\d\d)(?:T(\d\d)(?::?(\d\d)(?::?(\d\d))?)?)?", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class Time:
    """A partition's time and how it is written: to the day, the hour, the minute or the second."""

    at: datetime
    text: str

    @classmethod
    def parse(cls, text: str) -> "Time | None":
        """None where a text is no ISO date, or one with a time without a zone."""
        found = _TIME.fullmatch(text)
        if found is None:
            return None
        numbers = [int(number) for number in found.groups() if number is not None]
        try:
            at = datetime(*numbers)  # type: ignore[arg-type]  # noqa: DTZ001 - as it is written
        except ValueError:  # the 31st of February
            return None
        end = len("YYYY-MM-DD") + len("Thh") * (len(numbers) - len("YMD"))
        return cls(at, at.isoformat()[:end].replace(":", ""))


@dataclass(frozen=True, slots=True)
class Partition:
    """One folder name, such as `dt=2026-11-23`, and the files below folders of that name."""

    key: str
    paths: tuple[str, ...]


def partitions(paths: Sequence[str], since: str, until: str) -> list[Partition]:
    """The partitions with `since` ≤ time < `until`, by time.

    Args:
        paths: files and globs; every file lies in a folder `<name>=<time>`.
        since: the first time.
        until: the time after the last.

    Raises:
        UsageError: the interval is none, or a file is not in a partition, or they are
            partitioned by several names.
        InputError: a glob that matches nothing.
    """
    first, end = _bound("--since", since), _bound("--until", until)
    if first.at >= end.at:
        raise UsageError(
            f"The interval from {since} to {until} is empty.",
            where="--since, --until",
            valid="a --since before --until, which is not part of the interval itself",
        )
    found: dict[tuple[Time, str], list[str]] = {}
    names = set[str]()
    for path in expand(paths):
        name, time = _partition_of(path)
        names.add(name)
        if first.at <= time.at < end.at:
            found.setdefault((time, name), []).append(path)
    if len(names) > 1:
        raise UsageError(
            f"The inputs are partitioned by several names: {', '.join(sorted(names))}.",
            where="--input",
            valid="folders of one name, such as dt=",
        )
    return [Partition(f"{n}={time.text}", tuple(found[time, n])) for time, n in sorted(found)]


def spec_of(spec: JobSpec, partition: Partition) -> JobSpec:
    """The job of one partition: its files, and an output folder of its own."""
    folder = Path(spec.output.folder) / partition.key
    return replace(
        spec,
        input=replace(spec.input, paths=partition.paths),
        output=replace(spec.output, folder=str(folder)),
    )


def _bound(option: str, text: str) -> Time:
    time = Time.parse(text)
    if time is None:
        raise UsageError(f"{text!r} is no date.", where=option, valid=VALID)
    return time


def _partition_of(path: str) -> tuple[str, Time]:
    """Name and time of the folder `<name>=<time>` that a file lies in."""
    parts = [_COMPONENT.fullmatch(part) for part in PurePath(normpath(path)).parent.parts]
    pairs = [(part["name"], part["value"]) for part in parts if part]
    times = [(name, time) for name, value in pairs if (time := Time.parse(value))]
    if len(times) == 1:
        return times[0]
    said = ", ".join(f"{name}={value}" for name, value in pairs)
    raise UsageError(
        "An input lies in several partitions by time."
        if times
        else "An input lies in no partition by time.",
        where=f"{path}: {said}" if said else path,
        valid="one folder <name>=<date> above each file, such as dt=2026-11-23; "
        f"dates as {VALID}, without a zone",
    )
