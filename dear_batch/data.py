"""The types that flow through a job, in order. Knows nothing of files or models.

`Shard` → `CandidateList` → (token ids, rows) → scores → `ScoredList` → `Ranking` → (stage 2:
`RankedList` → `Window` → `Permutation` → `Ranking` of `Reranked`) → `RunLine`. What is set aside
on the way is a `Refusal`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

WindowStatus = Literal["ok", "truncated", "kept", "failed"]


@dataclass(frozen=True, slots=True)
class Shard:
    """A range of rows of one input file, cut at query boundaries.

    `first_row` counts from the start of the file, whatever the row groups.
    """

    path: str
    first_row: int
    n_rows: int
    n_queries: int
    key: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """One document of a candidate list. `text` is None where the input had a null."""

    docid: str
    title: str
    text: str | None
    first_score: float | None


@dataclass(frozen=True, slots=True)
class CandidateList:
    """A query and its candidates in first-stage order, as read: nothing is checked yet.

    `row` is the row of the file at which the list begins. `places` has, where candidates have
    rows of their own, the place of each in the user's files (see `files.places`).
    """

    qid: str | None
    query: str | None
    candidates: tuple[Candidate, ...]
    row: int
    places: Sequence[int] = ()

    def place(self, first_rank: int = 1) -> int:
        """Where the candidate of that rank (from 1) stands; the first stands for the list."""
        return self.places[first_rank - 1] if self.places else self.row


@dataclass(frozen=True, slots=True)
class Refusal:
    """A query (`docid` None) or a candidate set aside, with its reason and source position.

    `row_group` and `row` count from 0, `row` from the start of the user's own file: the row of
    the list, or of that very candidate where candidates have rows of their own. `candidates`
    is how many candidates left the job with it.
    """

    reason: str
    detail: str
    path: str
    row_group: int
    row: int
    qid: str | None
    docid: str | None
    candidates: int


@dataclass(frozen=True, slots=True)
class ScoredCandidate:
    """A candidate with its logit; `logit` is None below the scored depth."""

    docid: str
    first_rank: int
    first_score: float | None
    logit: float | None


@dataclass(frozen=True, slots=True)
class ScoredList:
    """The candidates of one query in first-stage order, scored."""

    qid: str
    candidates: tuple[ScoredCandidate, ...]


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate in its final place. `score` is exact in float32."""

    docid: str
    rank: int
    score: float
    logit: float | None
    first_score: float | None
    first_rank: int


@dataclass(frozen=True, slots=True)
class Ranking:
    """The final order of one query, best first, scores strictly decreasing as float32."""

    qid: str
    entries: tuple[Ranked, ...]


@dataclass(frozen=True, slots=True)
class RankedList:
    """Stage 1's order of a query as stage 2 takes it; `passages` are (title, text) of its top."""

    query: str
    ranking: Ranking
    passages: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Window:
    """The places `start` to `end` (exclusive, from 0) of one query's present order."""

    qid: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Permutation:
    """What the listwise model made of one window.

    `order[i]` is the place within the window (from 0) of the passage that comes i-th. `status`:
    ok; truncated (reasoning ran into its limit or stopped unclosed, `detail` says which, and
    the answer was forced from there); kept (a single passage: the model was not asked); failed
    (`detail` says why; `order` is the identity, as for kept). `logprobs[i]` is the natural log-
    probability of the i-th choice among what the answer grammar left, 0 for the last one; NaN
    where the model chose nothing. `text` is all that the model wrote, reasoning first.
    `overruled` counts the tokens of the answer in whose place the model's own greedy token,
    over its whole vocabulary, was another: at 0, plain greedy decoding writes the same up to
    the last identifier, which is free, after the same reasoning. Passages are cut to the
    prompt's own length, and shortened further where the window would not fit; texts that spell
    a special token are neutralised.
    """

    window: Window
    order: tuple[int, ...]
    status: WindowStatus
    logprobs: tuple[float, ...]
    text: str = ""
    detail: str = ""
    prompt_sha256: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    forwards: int = 0
    overruled: int = 0
    cut_passages: int = 0
    shortened_passages: int = 0
    neutralised_texts: int = 0


@dataclass(frozen=True, slots=True)
class Transcript:
    """Window `number` of a query, in the order of decoding, and the `docids` as it left them."""

    number: int
    permutation: Permutation
    docids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reranked(Ranked):
    """A candidate in its place after stage 2; the last three are None below the listwise depth.

    `window_status` and `choice_logprob` are those of the topmost window that held it, which
    put it where it is; the second is None where the model chose nothing.
    """

    pointwise_rank: int
    listwise_rank: int | None
    window_status: WindowStatus | None
    choice_logprob: float | None


@dataclass(frozen=True, slots=True)
class RunLine:
    """One line of a TREC run file; `str()` is the line without its newline."""

    qid: str
    docid: str
    rank: int
    score: float
    tag: str

    def __str__(self) -> str:
        """`qid Q0 docid rank score tag`; nine digits identify every float32."""
        return f"{self.qid} Q0 {self.docid} {self.rank} {self.score:.9g} {self.tag}"
