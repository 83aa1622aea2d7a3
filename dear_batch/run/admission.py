"""Decides which queries and candidates are scored and which are set aside, and why.

Knows nothing of models, and of files only where a row stands in them. The reasons are the
closed list `REASONS`; a TREC run file breaks, or evaluators refuse it, on most of them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from dear_batch.data import Candidate, CandidateList, Refusal
from dear_batch.errors import InputError
from dear_batch.files.places import Places

REASONS = {
    "bad_qid": "a null or empty qid, or white space or control characters in it",
    "duplicate_qid": "the qid has another list; the first one that can be scored is kept",
    "conflicting_query": "a row whose query is not that of its qid's first row with a query",
    "empty_query": "a null or blank query",
    "empty_list": "no candidates",
    "no_valid_candidates": "every candidate of the list was set aside",
    "bad_docid": "a null or empty docid, or white space or control characters in it",
    "duplicate_docid": "the docid came before in this list; the first one is kept",
    "null_text": "a null text",
    "empty_text": "a blank text without a title",
    "non_finite_score": "the model gave NaN or infinity",
    "kills_process": "the process died of it, more than once",
}
# Nothing to rank is nothing wrong: counted apart, and not quarantined.
SKIPPED = frozenset({"empty_list"})


@dataclass(frozen=True, slots=True)
class Admitted:
    """A list that will be scored: valid ids, unique docids, text everywhere.

    `first_ranks` are the candidates' ranks in the list as it was `read`, from 1; `places` knows
    where that was.
    """

    qid: str
    query: str
    candidates: tuple[Candidate, ...]
    first_ranks: tuple[int, ...]
    read: CandidateList
    places: Places

    def refuse(self, reason: str, candidates: int) -> Refusal:
        """Set the list aside after all, and `candidates` with it that are not yet."""
        return _refusal(reason, self.read, self.places, candidates=candidates)

    def refuse_candidate(self, reason: str, docid: str) -> Refusal:
        """Set one of its candidates aside after all."""
        pairs = zip(self.candidates, self.first_ranks, strict=True)
        rank = next(rank for candidate, rank in pairs if candidate.docid == docid)
        return _refusal(reason, self.read, self.places, rank)


def valid_id(text: str) -> bool:
    """Whether an id can stand in a TREC file: not empty, no white space, no control character.

    Of all white space, `isprintable` lets only the plain space pass.
    """
    return bool(text) and text.isprintable() and " " not in text


class Admission:
    """Checks the lists of one shard in order.

    Args:
        places: where rows stand in the user's files; made once for all shards of a source.
        kept_rows: the row of the list to keep for each qid that has several; None where that
            lies in another file.
        need_first_scores: interpolation wants a finite first-stage score everywhere.
    """

    def __init__(
        self,
        places: Places,
        kept_rows: Mapping[str, int | None] | None = None,
        *,
        need_first_scores: bool = False,
    ) -> None:
        self._places = places
        self._kept_rows = kept_rows or {}
        self._need_first_scores = need_first_scores

    def admit(self, lists: Iterable[CandidateList]) -> Iterator[Admitted | Refusal]:
        """Every refusal, and every list of which a candidate is left."""
        for item in lists:
            reason = self._query_fault(item)
            if reason:
                yield _refusal(reason, item, self._places, candidates=len(item.candidates))
            else:
                yield from self._admit_candidates(item)

    def admit_flat(self, lists: Iterable[CandidateList]) -> Iterator[Admitted | Refusal]:
        """The same for a flat file, whose reader starts a list where the query text changes.

        Lists of one qid in a row are one query: the first with a query stands for it, the
        rows of the others are set aside as candidates.
        """
        for _, group in groupby(lists, key=lambda item: item.qid):
            items = list(group)
            kept = next((item for item in items if _has_query(item)), items[0])
            for item in items:
                if item is not kept:
                    for rank in range(1, len(item.candidates) + 1):
                        yield _refusal("conflicting_query", item, self._places, rank)
            yield from self.admit([kept])

    def _query_fault(self, item: CandidateList) -> str | None:
        fault = _own_fault(item)
        if fault is None and self._kept_rows.get(str(item.qid), item.row) != item.row:
            return "duplicate_qid"
        return fault

    def _admit_candidates(self, item: CandidateList) -> Iterator[Admitted | Refusal]:
        kept: dict[str, tuple[int, Candidate]] = {}
        for rank, candidate in enumerate(item.candidates, start=1):
            reason = _candidate_fault(candidate, kept)
            if reason:
                yield _refusal(reason, item, self._places, rank)
            else:
                kept[candidate.docid] = (rank, candidate)
        if not kept:
            yield _refusal("no_valid_candidates", item, self._places, candidates=0)
            return
        ranks, candidates = zip(*kept.values(), strict=True)
        if self._need_first_scores:
            self._check_first_scores(item, kept.values())
        yield Admitted(str(item.qid), str(item.query), candidates, ranks, item, self._places)

    def _check_first_scores(
        self, item: CandidateList, kept: Iterable[tuple[int, Candidate]]
    ) -> None:
        for rank, candidate in kept:
            score = candidate.first_score
            if score is None or not math.isfinite(score):
                path, row_group, row = self._places.position(item.place(rank))
                raise InputError(
                    "Interpolation needs a first-stage score for every candidate.",
                    where=f"{path}, row group {row_group}, row {row}, qid {item.qid}, "
                    f"docid {candidate.docid}: score {score}",
                    valid="a finite `score`, or --interpolate 1",
                )


def _refusal(
    reason: str, item: CandidateList, places: Places, rank: int | None = None, candidates: int = 1
) -> Refusal:
    """Set aside the candidate of that rank in the list as it was read, or the whole list."""
    path, row_group, row = places.position(item.place(rank or 1))
    docid = None if rank is None else item.candidates[rank - 1].docid
    return Refusal(
        reason, REASONS[reason], path, row_group, row, item.qid, docid, candidates=candidates
    )


def can_be_scored(item: CandidateList) -> bool:
    """Whether a list would be admitted, were its qid its own."""
    if _own_fault(item):
        return False
    return any(_candidate_fault(candidate, {}) is None for candidate in item.candidates)


def _has_query(item: CandidateList) -> bool:
    return bool((item.query or "").strip())


def _own_fault(item: CandidateList) -> str | None:
    if item.qid is None or not valid_id(item.qid):
        return "bad_qid"
    if not _has_query(item):
        return "empty_query"
    return None if item.candidates else "empty_list"


def _candidate_fault(candidate: Candidate, kept: dict[str, tuple[int, Candidate]]) -> str | None:
    if not valid_id(candidate.docid):
        return "bad_docid"
    if candidate.docid in kept:
        return "duplicate_docid"
    if candidate.text is None:
        return "null_text"
    if not candidate.text.strip() and not candidate.title.strip():
        return "empty_text"
    return None
