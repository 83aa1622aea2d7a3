"""Permutation decoding: a batch of windows answers in step, greedily under the grammar.

Prompts are read without padding where that is fast, then each forward takes every row to its
next choice; rows leave when their order is decided. Knows nothing of queries or passages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dear_batch.listwise.model import LanguageModel
from dear_batch.listwise.reasoning import Reasoning
from dear_batch.listwise.writing import Logits, Speller, Writer
from dear_batch.torch_memory import memory_errors

Ids = NDArray[np.int32]
SPARE_SLOTS = 16  # slots allotted for each identifier; more are made when a batch runs out
GREEDY_ROWS = 256  # states that go through the whole output layer at once


@dataclass(slots=True)
class Row:
    """A sequence of the batch: reasoning, where it has some, then its answer.

    `position` is that of the next token fed. A writer that comes first must have begun.
    """

    prompt: Ids
    writer: Writer
    reasoning: Reasoning | None = None
    position: int = 0
    forwards: int = 0
    overruled: int = 0

    @property
    def turn(self) -> Reasoning | Writer:
        """Whose feed is next."""
        return self.reasoning if self.reasoning and not self.reasoning.over else self.writer


class PermutationDecoder:
    """Decodes batches with one model.

    Legend: R rows, T tokens of a forward, S slots, H hidden size, V vocabulary of answers.
    """

    def __init__(self, model: LanguageModel, speller: Speller, prefill_tokens: int) -> None:
        self._model = model
        self._speller = speller
        self._prefill_tokens = prefill_tokens
        self._head_VH = model.head(speller.vocabulary.ids)
        self.forwards = 0

    def decode(self, rows: Sequence[Row]) -> None:
        """Write all answers; each row's writer then holds its own.

        Raises:
            MemoryError: there is not enough for these rows, which are then of no more use;
                nothing of the attempt is held.
        """
        try:
            with memory_errors(), torch.inference_mode():
                self._decode(rows)
        except MemoryError:
            self._release()
            raise

    def _decode(self, rows: Sequence[Row]) -> None:
        self._speller.forget()
        active = sorted(rows, key=lambda row: len(row.prompt))
        slots = max(slots_of(row) for row in rows)
        self._model.begin(len(rows), slots)
        self._seen_RS = torch.zeros((len(rows), slots), dtype=torch.bool, device=self._model.device)
        self._chosen: list[tuple[Row, int]] = []
        self._states: list[torch.Tensor] = []
        self._read(active)
        while self._without_done(active):
            self._step(active[: self._reasoning_first(active) or None])
        self._count_overruled()
        self._release()

    def _release(self) -> None:
        self._model.end()
        self._chosen, self._states = [], []

    def _read(self, rows: Sequence[Row]) -> None:
        """Prompts of similar lengths together, as many as the budget holds; the first alone.

        What all prompts begin with is run with the first one only.
        """
        shared = _shared_start([row.prompt for row in rows])
        self._read_group(rows[:1], 0, 0)
        start = 1
        while start < len(rows):
            end = start + 1
            while end < len(rows) and (end + 1 - start) * (len(rows[end].prompt) - shared) <= (
                self._prefill_tokens
            ):
                end += 1
            self._read_group(rows[start:end], start, shared)
            start = end

    def _read_group(self, rows: Sequence[Row], first: int, shared: int) -> None:
        prompts = [[*row.prompt.tolist(), *row.turn.feed[1:]] for row in rows]
        hidden_RTH = self._model.read_prompts(first, prompts, shared)
        cache = self._model.cache
        cache.used = max(cache.used, *map(len, prompts))
        starts = [len(row.prompt) - 1 for row in rows]
        # Clones: a view would keep the states of all prompts.
        tails = [hidden_RTH[i, start - shared :].clone() for i, start in enumerate(starts)]
        for i, (row, kept) in enumerate(zip(rows, self._accept(rows, tails), strict=True)):
            row.position = starts[i] + kept
            self._seen_RS[first + i, : row.position] = True

    def _without_done(self, active: list[Row]) -> bool:
        """Let rows leave: the last active row takes the place."""
        for place in reversed(range(len(active))):
            if active[place].writer.done:
                self._swap(active, place, len(active) - 1)
                active.pop()
        return bool(active)

    def _reasoning_first(self, active: list[Row]) -> int:
        """How many rows reason; they step alone, a token each, till all the rest can write."""
        count = 0
        for place, row in enumerate(active):
            if isinstance(row.turn, Reasoning):
                self._swap(active, place, count)
                count += 1
        return count

    def _swap(self, active: list[Row], one: int, other: int) -> None:
        if one != other:
            active[one], active[other] = active[other], active[one]
            self._model.cache.swap(one, other)
            self._seen_RS[[one, other]] = self._seen_RS[[other, one]]

    def _step(self, rows: Sequence[Row]) -> None:
        tokens = max(len(row.turn.feed) for row in rows)
        ids_RT = torch.zeros((len(rows), tokens), dtype=torch.long)
        for i, row in enumerate(rows):
            ids_RT[i, : len(row.turn.feed)] = torch.tensor(row.turn.feed)
        positions_RT = torch.tensor([[row.position] for row in rows]) + torch.arange(tokens)
        used = self._model.cache.used
        hidden_RTH = self._model.step(ids_RT, positions_RT, self._seen(len(rows), tokens, used))
        kept_R = self._accept(rows, list(hidden_RTH))
        kept_RT = torch.arange(tokens) < torch.tensor(kept_R)[:, None]
        self._seen_RS[: len(rows), used : used + tokens] = kept_RT.to(self._seen_RS.device)
        for row, kept in zip(rows, kept_R, strict=True):
            row.position += kept

    def _seen(self, rows: int, tokens: int, used: int) -> torch.Tensor:
        """Which slots each new token may see: what its row kept, and itself and those before."""
        more = used + tokens - self._seen_RS.shape[1]
        if more > 0:
            blank = self._seen_RS.new_zeros((self._seen_RS.shape[0], max(more, used // 4)))
            self._seen_RS = torch.cat([self._seen_RS, blank], dim=1)
        before_RTS = self._seen_RS[:rows, None, :used].expand(-1, tokens, -1)
        own_TT = self._seen_RS.new_ones((tokens, tokens)).tril()
        return torch.cat([before_RTS, own_TT.expand(rows, -1, -1)], dim=2)

    def _accept(self, rows: Sequence[Row], states: Sequence[torch.Tensor]) -> list[int]:
        """Give each row the model's view behind its feed, states [T, H]; how many tokens stand."""
        self.forwards += 1
        for row in rows:
            row.forwards += 1
        kept = {}
        turns = [(i, row.turn) for i, row in enumerate(rows)]
        thinking = [(i, turn) for i, turn in turns if isinstance(turn, Reasoning)]
        if thinking:
            greedy = self._model.greedy(torch.stack([states[i][0] for i, _ in thinking]))
            for (i, reasoning), token in zip(thinking, greedy, strict=True):
                reasoning.take(token)
                kept[i] = 1
        writing = [i for i in range(len(rows)) if i not in kept]
        if writing:
            lengths = [len(rows[i].turn.feed) for i in writing]
            together = torch.cat([states[i][:n] for i, n in zip(writing, lengths, strict=True)])
            logits_NV = (together.float() @ self._head_VH.T).cpu().numpy()
            parts = np.split(logits_NV, np.cumsum(lengths)[:-1])
            for i, logits_TV in zip(writing, parts, strict=True):
                kept[i] = self._write(rows[i], states[i], logits_TV)
        return [kept[i] for i in range(len(rows))]

    def _write(self, row: Row, states_TH: torch.Tensor, logits_TV: Logits) -> int:
        first = row.writer.given - 1
        kept, new = row.writer.accept(logits_TV)
        self._chosen += [
            (row, token) for token in row.writer.tokens[len(row.writer.tokens) - new :]
        ]
        self._states += states_TH[first : first + new]
        return kept

    def _count_overruled(self) -> None:
        """Where the model's own greedy token, over its whole vocabulary, was another."""
        for start in range(0, len(self._chosen), GREEDY_ROWS):
            part = slice(start, start + GREEDY_ROWS)
            greedy = self._model.greedy(torch.stack(self._states[part]))
            for (row, chosen), token in zip(self._chosen[part], greedy, strict=True):
                row.overruled += token != chosen


def slots_of(row: Row) -> int:
    """The slots that a row will probably need: its prompt, its reasoning, its answer."""
    reasoning = row.reasoning.rules.limit if row.reasoning else 0
    answer = len(row.turn.feed) + SPARE_SLOTS * len(row.writer.state.unused)
    return len(row.prompt) + reasoning + answer


def _shared_start(prompts: Sequence[Ids]) -> int:
    """How many tokens all prompts begin with; each keeps one of its own."""
    shortest = min(map(len, prompts)) - 1
    first = prompts[0][:shortest]
    same = [int(np.argmin([*(first == other[:shortest]), False])) for other in prompts[1:]]
    return min(same, default=0)
