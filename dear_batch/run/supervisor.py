"""The parent of a job: starts the process that works, and again when it dies.

A job goes on from its commits. A shard in which its process dies twice is searched for the
items that kill it, in processes of their own. Nothing that could crash is imported here.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dear_batch.errors import DearBatchError, TryAgainError
from dear_batch.log import log
from dear_batch.run.child import Advance, Child, ChildDiedError, Place
from dear_batch.run.interrupts import Interrupts
from dear_batch.run.poison import TooMuchPoisonError, find_poison
from dear_batch.run.worker import spec_to_json
from dear_batch.specs import JobSpec

SEARCHABLE = ("pointwise", "listwise")  # stages whose items a probe can work through
SHOWN_WORDS = 8  # last lines of stderr in an error; the log has them all
SHOWN_CHARACTERS = 200  # of each
OUT_OF_MEMORY = "SIGKILL from nobody is mostly the kernel short of memory: see `journalctl -k`"
_STACK = re.compile(r" *File |Thread 0x|Current thread|Extension modules|  <no Python frame>")

Stages = Literal["all", "pointwise", "listwise"]
OnLoss = Callable[[DearBatchError, str], None]  # (error, phase)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a job that was published came to."""

    report: dict[str, Any]
    exit_code: int


def supervise(
    spec: JobSpec,
    *,
    stage: Stages = "all",
    restart: bool = False,
    advance: Advance | None = None,
    on_loss: OnLoss | None = None,
) -> Outcome:
    """Run a job in a child process; to be called by the main thread, which gets the signals.

    Args:
        spec: the job.
        stage: as `run_job`.
        restart: as `run_job`.
        advance: shows progress.
        on_loss: reports the error of a job whose process began and died, was killed or hung,
            and so could not report it itself; it gets the phase as well.

    Raises:
        StoppedError: SIGTERM, SIGINT or SIGHUP came.
        TryAgainError: nothing moved, or the child kept dying.
        DearBatchError: the job's own error; of this very class where it is a bug.
    """
    with Interrupts() as interrupts:
        job = _Supervisor(spec, stage, interrupts, restart=restart)
        try:
            report = job.report(advance)
        except DearBatchError as error:
            if job.lost and on_loss:
                on_loss(error, job.lost.phase)
            log("ended", exit_code=error.exit_code)
            raise
    outcome = Outcome(report, int(report.get("exit_code", 0)))
    log("ended", exit_code=outcome.exit_code)
    return outcome


class _Supervisor:
    def __init__(
        self, spec: JobSpec, stage: Stages, interrupts: Interrupts, *, restart: bool
    ) -> None:
        self._spec = spec
        self._stage = stage
        self._interrupts = interrupts
        self._restart = restart
        self.lost: Place | None = None  # where the last process did not tell its own end
        self._deaths = Counter[Place]()
        self._poison = dict[str, list[int]]()

    def report(self, advance: Advance | None) -> dict[str, Any]:
        while True:
            request = {
                "stage": self._stage,
                "restart": self._restart,
                "careful": bool(self._deaths),
                "poison": self._poison,
            }
            try:
                report: dict[str, Any] = self._run({"job": request}, Place("start"), advance)
            except ChildDiedError as death:
                self._after(death)
            else:
                return report

    def _run(
        self, request: Mapping[str, dict[str, Any]], place: Place, advance: Advance | None = None
    ) -> Any:
        """The result of one child."""
        ((kind, fields),) = request.items()
        whole = {kind: {"spec": spec_to_json(self._spec), **fields}}
        self._interrupts.check()
        stall_s = self._spec.execution.stall_timeout_s
        with Child(whole, place, self._interrupts, stall_s) as child:
            try:
                return child.result(advance)
            finally:
                if kind == "job":
                    self.lost = None if child.told else child.place

    def _after(self, death: ChildDiedError) -> None:
        """Prepare another start, or give up."""
        place = death.place
        self._deaths[place] += 1
        if death.began:
            self._restart = False  # what is committed by now is this run's own
        _log_death(death, self._deaths[place])
        searchable = place.shard and place.stage in SEARCHABLE
        if self._deaths[place] > (2 if searchable else 1):
            raise _gave_up("The process of the job keeps dying", death)
        if self._deaths[place] > 1:
            self._search(death)
        log("restarting", level="warning", where=str(place))

    def _search(self, death: ChildDiedError) -> None:
        """Find what kills the process in a shard, so that the next start leaves it out."""
        place = death.place
        found = self._found(death)
        log("searched", level="warning", where=str(place), ordinals=sorted(found))
        if found:
            self._poison[f"{place.stage}/{place.shard}"] = sorted(found)

    def _found(self, death: ChildDiedError) -> frozenset[int]:
        place = death.place
        try:
            return find_poison(
                self._probe(place, 0, None), lambda first, end: self._kills(place, first, end)
            )
        except ChildDiedError as another:  # without any item, so none is to blame
            _log_death(another, self._deaths[place])
            return frozenset()
        except TooMuchPoisonError as error:
            what = f"The process of the job keeps dying, and the search was given up: {error}"
            raise _gave_up(what, death) from None

    def _kills(self, place: Place, first: int, end: int) -> bool:
        try:
            self._probe(place, first, end)
        except ChildDiedError as death:
            log("probed", where=str(place), first=first, end=end, died=death.how)
            return True
        log("probed", where=str(place), first=first, end=end, died=None)
        return False

    def _probe(self, place: Place, first: int, end: int | None) -> int:
        """Work through a range of a shard's items, none without an end; how many it has in all."""
        fields = {"stage": place.stage, "shard": place.shard, "first": first, "end": end}
        items: int = self._run({"probe": fields}, place)
        return items


def _log_death(death: ChildDiedError, times: int) -> None:
    hint = {"hint": OUT_OF_MEMORY} if death.how == "SIGKILL" else {}
    log("died", "error", by=death.how, where=str(death.place), times=times, **hint)


def _gave_up(what: str, death: ChildDiedError) -> TryAgainError:
    words = [word for word in death.last_words if not _STACK.match(word)][-SHOWN_WORDS:]
    words = [word[:SHOWN_CHARACTERS] for word in words]
    said = "; it said nothing on stderr" if not words else "; it said last:"
    hint = f"; {OUT_OF_MEMORY}" if death.how == "SIGKILL" else ""
    return TryAgainError(
        "\n    ".join([f"{what} ({death.how}){said}", *words]),
        where=str(death.place),
        next_step="see the log; running the same command again goes on from what is finished"
        + hint,
    )
