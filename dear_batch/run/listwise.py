"""Stage 2: re-orders the top of each list in the committed parts of stage 1.

What can be refused without the weights is refused by `prepare`, before stage 1 begins. Its
shards are those of stage 1, several together where one holds too few lists to fill a batch.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from dear_batch.bundle import Bundle, open_bundle
from dear_batch.data import RankedList, Transcript
from dear_batch.errors import missing_extra
from dear_batch.files.parquet import grouped
from dear_batch.files.parts import RERANKED_SCHEMA, list_size, part_writer, read_part
from dear_batch.files.results import transcript_writer
from dear_batch.listwise.preflight import check_listwise
from dear_batch.run.ledger import Commit, Ledger
from dear_batch.run.planning import PlannedOutput, second_stage
from dear_batch.run.pointwise import Poison
from dear_batch.run.report import ListwiseTally
from dear_batch.run.watch import Watch
from dear_batch.run.waves import Course, Ranker, rerank
from dear_batch.specs import ListwiseSpec

STAGE = "listwise"
NEEDED = ("torch", "transformers")
WAVE_BYTES = 32 << 20  # of lists in memory, however many a model would take
NOTHING: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Group:
    """A shard of stage 2: consecutive shards of stage 1, of one output."""

    key: str
    queries: int
    parts: tuple[Path, ...]
    sha256: str


def prepare(spec: ListwiseSpec, device: str, *, paranoid: bool = False) -> Bundle:
    """Open the listwise bundle and check all that needs no weights.

    Raises:
        ConfigurationError: a package or the device is missing, the bundle is not listwise, or
            it does not go with the prompt or the windows.
        TrustError: the bundle is not what its manifest says.
    """
    for package in NEEDED:
        if find_spec(package) is None:
            raise missing_extra(package, "listwise", "The listwise stage")
    if device.startswith("cuda"):  # only then is PyTorch worth its memory during stage 1
        from dear_batch.listwise.model import found_device

        found_device(device)
    bundle = open_bundle(spec.bundle, task="listwise", paranoid=paranoid)
    check_listwise(bundle, spec)
    return bundle


def open_ranker(bundle: Bundle, spec: ListwiseSpec, device: str) -> Ranker:
    """Load the weights."""
    from dear_batch.listwise.ranker import ListwiseRanker

    return ListwiseRanker.open(bundle, spec, device)


def groups_of(
    outputs: Sequence[PlannedOutput], commits: Mapping[str, Commit], ledger: Ledger
) -> list[list[Group]]:
    """The shards of stage 2, output by output, from the commits of stage 1 by shard."""
    return [
        [_group([commits[s.key] for s in some], ledger) for some in second_stage(output)]
        for output in outputs
    ]


def _group(commits: Sequence[Commit], ledger: Ledger) -> Group:
    parts = [commit.files["part"] for commit in commits]
    sha256 = hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest()
    queries = sum(commit.counts["queries"]["written"] for commit in commits)
    return Group(commits[0].shard, queries, tuple(map(ledger.path_of, parts)), sha256)


@dataclass(frozen=True, slots=True)
class Stage:
    """What every shard of a job shares."""

    spec: ListwiseSpec
    ranker: Ranker
    ledger: Ledger
    fingerprint: str
    watch: Watch
    poison: Poison
    intact: Callable[[], None]  # raises where the bundle changed while it was in use

    def run(self, todo: Sequence[Group], done: int, total: int) -> list[Commit]:
        """Re-rank and commit shards; `done` of `total` queries are committed already."""
        commits = []
        for group in todo:
            self.watch.check()
            self.watch.shard(STAGE, group.key)
            commits.append(self._shard(group, done, total))
            done += group.queries
        return commits

    def _shard(self, group: Group, done: int, total: int) -> Commit:
        """Re-rank a shard to its end, and commit it."""
        tally, before = ListwiseTally(), self.ranker.memory_backoffs
        part = self.ledger.new_file("parts", group.key, self.fingerprint)
        notes = self.ledger.new_file("parts", group.key, self.fingerprint, ".transcripts")
        with part_writer(part, RERANKED_SCHEMA) as write, transcript_writer(notes) as record:
            for wave, poison in self._waves(group, tally):
                advance = partial(self._advance, total, done + tally.queries, len(wave))
                with tally.timed("rank"):
                    courses = rerank(wave, self.spec, self.ranker, advance, poison)
                with tally.timed("write"):
                    for course in courses:
                        _finish(course, tally, write, record)
        tally.memory_backoffs = self.ranker.memory_backoffs - before
        if tally.queries != group.queries:
            raise AssertionError(f"{tally.queries} queries of {group.queries} were re-ranked")
        self.intact()
        return self.ledger.commit(
            STAGE,
            group.key,
            fingerprint=self.fingerprint,
            input_sha256=group.sha256,
            files={"part": part, "transcripts": notes},
            counts=tally.to_json(),
        )

    def _waves(
        self, group: Group, tally: ListwiseTally
    ) -> Iterator[tuple[list[RankedList], frozenset[int]]]:
        """Lists that go together, and which of them the model is not shown."""
        poison = self.poison.get(f"{STAGE}/{group.key}", NOTHING)
        most, first = self.ranker.wave_queries, 0
        waves = grouped(lists_of(group), list_size, most=most, limit=WAVE_BYTES)
        while True:
            with tally.timed("read"):
                wave = next(waves, None)
            if wave is None:
                return
            yield wave, frozenset(n - first for n in poison if first <= n < first + len(wave))
            first += len(wave)

    def _advance(self, total: int, before: int, queries: int, share: float) -> None:
        self.watch.check()
        self.watch.advance(STAGE, before + share * queries, total)


def lists_of(group: Group) -> Iterator[RankedList]:
    """The lists of a shard in order."""
    for part in group.parts:
        yield from read_part(part)


def _finish(
    course: Course,
    tally: ListwiseTally,
    write: Callable[..., None],
    record: Callable[[Transcript], None],
) -> None:
    ranking = course.ranking()
    write(ranking)
    tally.ranked(ranking)
    for transcript in course.transcripts:
        record(transcript)
        tally.answered(transcript.permutation)
