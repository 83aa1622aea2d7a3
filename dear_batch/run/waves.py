"""Lists on their way through their windows: the i-th windows of many lists are asked together.

Windows of one list depend on each other, from the bottom to the top; those of different lists
do not. Knows nothing of files, nor of what a model does with a window.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dear_batch.data import (
    Permutation,
    RankedList,
    Ranking,
    Reranked,
    Transcript,
    Window,
    WindowStatus,
)
from dear_batch.listwise.prompts import passage_text
from dear_batch.listwise.windows import WindowRequest, apply, kept, windows
from dear_batch.specs import ListwiseSpec

KILLS = "the process died of this query, more than once"


class Ranker(Protocol):
    """A listwise model as a job sees it."""

    @property
    def device(self) -> str:
        """Where it computes."""
        ...

    @property
    def precision(self) -> str:
        """What it computes in."""
        ...

    @property
    def memory_backoffs(self) -> int:
        """How often it had to halve a batch so far, because memory ran out."""
        ...

    @property
    def wave_queries(self) -> int:
        """How many lists it wants at once."""
        ...

    def rank(
        self, requests: Sequence[WindowRequest], done: Callable[[int], None]
    ) -> list[Permutation]:
        """An answer to each request, in their order; `done` hears how many are finished.

        A window that cannot be answered is `failed`, with the identity as its order.
        """
        ...


@dataclass(slots=True)
class Course:
    """One list: its windows, the present order of its top, and what became of each place."""

    item: RankedList
    windows: list[tuple[int, int]]
    order: list[int]
    poisoned: bool = False
    transcripts: list[Transcript] = field(default_factory=list)
    placed: dict[int, tuple[WindowStatus, float | None]] = field(default_factory=dict)

    def request(self, number: int) -> WindowRequest:
        """What to ask about a window, given the order so far."""
        start, end = self.windows[number]
        passages = (self.item.passages[place] for place in self.order[start:end])
        texts = (passage_text(title, text) for title, text in passages)
        return WindowRequest(
            Window(self.item.ranking.qid, start, end), self.item.query, tuple(texts)
        )

    def take(self, number: int, answer: Permutation) -> None:
        """Reorder the window's places as the answer says."""
        start, end = self.windows[number]
        self.order = apply(answer, self.order)
        inside = self.order[start:end]
        for place, logprob in zip(inside, answer.logprobs, strict=True):
            self.placed[place] = (answer.status, None if math.isnan(logprob) else logprob)
        docids = tuple(self.item.ranking.entries[place].docid for place in inside)
        self.transcripts.append(Transcript(number, answer, docids))

    def ranking(self) -> Ranking:
        """The final order; each place keeps its score of stage 1, so that scores still fall."""
        entries = self.item.ranking.entries
        order = [*self.order, *range(len(self.order), len(entries))]
        final = (
            self._entry(place, rank, entries[rank - 1].score)
            for rank, place in enumerate(order, start=1)
        )
        return Ranking(self.item.ranking.qid, tuple(final))

    def _entry(self, place: int, rank: int, score: float) -> Reranked:
        entry = self.item.ranking.entries[place]
        status, logprob = self.placed.get(place, (None, None))
        return Reranked(
            docid=entry.docid,
            rank=rank,
            score=score,
            logit=entry.logit,
            first_score=entry.first_score,
            first_rank=entry.first_rank,
            pointwise_rank=entry.rank,
            listwise_rank=None if status is None else rank,
            window_status=status,
            choice_logprob=logprob,
        )


def rerank(
    items: Sequence[RankedList],
    spec: ListwiseSpec,
    ranker: Ranker,
    advance: Callable[[float], None] = lambda _share: None,
    poison: frozenset[int] = frozenset(),
) -> list[Course]:
    """Take a wave of lists through all their windows; `advance` is told the share done.

    The lists whose numbers are `poison` are not shown to the model: all their windows fail.
    """
    courses = [_course(item, spec, i in poison) for i, item in enumerate(items)]
    total = sum(len(course.windows) for course in courses)
    finished = 0
    for number in range(max((len(course.windows) for course in courses), default=0)):
        under_way = [course for course in courses if number < len(course.windows)]

        def done(windows: int, before: int = finished) -> None:
            advance((before + windows) / total)

        asked = [course for course in under_way if not course.poisoned]
        answers = _ask([course.request(number) for course in asked], ranker, done)
        for course, answer in zip(asked, answers, strict=True):
            course.take(number, answer)
        for course in under_way:
            if course.poisoned:
                course.take(number, _not_asked(course.request(number).window))
        finished += len(under_way)
        advance(finished / total)
    return courses


def _course(item: RankedList, spec: ListwiseSpec, poisoned: bool) -> Course:
    depth = min(spec.depth, len(item.ranking.entries))
    return Course(item, windows(depth, spec.window, spec.stride), list(range(depth)), poisoned)


def _not_asked(window: Window) -> Permutation:
    size = window.end - window.start
    nothing = (math.nan,) * size
    return Permutation(window, tuple(range(size)), "failed", nothing, detail=KILLS)


def _ask(
    requests: Sequence[WindowRequest], ranker: Ranker, done: Callable[[int], None]
) -> list[Permutation]:
    """The answers; nothing is asked about a single passage."""
    asked = [request for request in requests if len(request.passages) > 1]
    answers = iter(ranker.rank(asked, done) if asked else [])
    found = [
        next(answers) if len(request.passages) > 1 else kept(request.window) for request in requests
    ]
    if next(answers, None) is not None:
        raise AssertionError("more answers than windows")
    return found
