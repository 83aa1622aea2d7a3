"""Kills the job of `job.py` at every call that changes the disk, or at random moments.

`python -m tests.faults.kills SETTINGS.json FOLDER every STRIDE`, `… restart STRIDE` (a finished
job that is begun anew) or `… random COUNT` deaths. After each kill the job runs again. Prints one
JSON line: how many kills, and what went wrong.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tests.faults.job import forked, in_child, kill_at, run, wait

PUBLISHED = ("run.trec", "results.parquet")


class Kills:
    """Kills and what they led to."""

    def __init__(self, settings: dict[str, Any], folder: Path) -> None:
        self._settings, self._folder = settings, folder
        start = time.monotonic()
        report = in_child(settings, folder / "whole")
        self.seconds = time.monotonic() - start
        self._shards = sum(shards["done"] for shards in report["shards"].values())
        self._wanted = {name: (folder / "whole" / name).read_bytes() for name in PUBLISHED}
        self._accounts = {name: report[name] for name in ("queries", "candidates", "status")}
        self.kills = self.kept = self.survived = 0
        self.faults: list[str] = []

    def at(self, number: int, *, after: bool, restart: bool = False) -> bool:
        """Kill at a call; False where the job has no so many."""
        folder = self._folder / f"at-{number}-{after}"
        settings = {**self._settings, "options": {"restart": restart}}
        if restart:
            shutil.copytree(self._folder / "whole", folder)

        def work() -> None:
            kill_at(number, after=after)
            run(settings, folder)

        died = wait(forked(work)) == -signal.SIGKILL
        self._again(folder, f"call {number}, {'after' if after else 'before'}", died=died)
        return died

    def moment(self, number: int, seconds: float) -> None:
        """Kill after so many seconds."""
        folder = self._folder / f"moment-{number}"
        pid = forked(lambda: run(self._settings, folder))
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        died = wait(pid) == -signal.SIGKILL
        self._again(folder, f"after {seconds:.4f} s", died=died)

    def _again(self, folder: Path, place: str, *, died: bool) -> None:
        """Run the job again and compare with the undisturbed run."""
        self.kills += died
        self.survived += not died
        committed = sum(
            len([*(folder / "commits" / stage).glob("[!.]*.json")])
            for stage in ("pointwise", "listwise")
        )
        was_done = (folder / "_SUCCESS").exists()
        report = in_child(self._settings, folder)
        if "error" in report:
            self.faults.append(f"{place}: {report['error']}")
            return
        shards = report["shards"].values()
        kept = sum(some["kept"] for some in shards)
        self.kept += kept
        if not was_done and kept != committed:
            self.faults.append(f"{place}: {committed} shards were committed, {kept} kept")
        if sum(some["done"] for some in shards) != self._shards:
            self.faults.append(f"{place}: shards {report['shards']}")
        for name, wanted in self._wanted.items():
            if (folder / name).read_bytes() != wanted:
                self.faults.append(f"{place}: {name} differs")
        if any(report[name] != value for name, value in self._accounts.items()):
            self.faults.append(f"{place}: the counts differ")
        left = [path.name for path in folder.rglob("*.tmp")]
        if left or not (folder / "_SUCCESS").exists():
            self.faults.append(f"{place}: left {left}")
        shutil.rmtree(folder)

    def result(self) -> str:
        """One JSON line."""
        fields = {name: getattr(self, name) for name in ("kills", "survived", "kept", "faults")}
        return json.dumps(fields)


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    kills = Kills(settings, Path(sys.argv[2]))
    how, amount = sys.argv[3], int(sys.argv[4])
    if how in {"every", "restart"}:
        for after in (False, True):
            number = 1
            while kills.at(number, after=after, restart=how == "restart"):
                number += amount
    else:
        chance = random.Random(20261123)
        for number in range(4 * amount):
            if kills.kills < amount:  # a moment after the end is no death
                kills.moment(number, chance.uniform(0, kills.seconds))
    sys.stdout.write(kills.result())


if __name__ == "__main__":
    main()
