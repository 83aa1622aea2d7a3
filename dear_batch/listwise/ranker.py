"""The listwise model of a job: windows in, permutations out, many at once.

Knows nothing of files, shards, or what becomes of an order.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import nan
from typing import TYPE_CHECKING, Self

from tokenizers import Tokenizer

from dear_batch.data import Permutation
from dear_batch.errors import missing_extra, too_little_memory
from dear_batch.listwise.encoding import EncodedPrompt, PromptEncoder
from dear_batch.listwise.grammar import Grammar, Vocabulary
from dear_batch.listwise.preflight import check_listwise
from dear_batch.listwise.prompts import Prompt
from dear_batch.listwise.windows import WindowRequest
from dear_batch.specs import ListwiseSpec

try:
    from dear_batch.listwise.decoding import PermutationDecoder, Row, slots_of
    from dear_batch.listwise.model import LanguageModel, Precision, found_device
    from dear_batch.listwise.reasoning import Reasoning, Rules
    from dear_batch.listwise.writing import Speller, Writer
    from dear_batch.torch_memory import memory_errors
except ModuleNotFoundError as error:
    raise missing_extra(error.name or "torch", "listwise", "The listwise stage") from error

if TYPE_CHECKING:
    from dear_batch.bundle import Bundle


@dataclass(frozen=True, slots=True)
class Budget:
    """What a device takes at once: rows of a batch, and tokens of one forward over prompts."""

    rows: int
    prefill_tokens: int


# CPU: benchmarks/results/listwise-cache.json. CUDA: not measured.
BUDGETS = {"cpu": Budget(16, prefill_tokens=512), "cuda": Budget(128, prefill_tokens=16384)}
NO_ROOM = "the query leaves no room for the passages"
NO_MEMORY = "there is no memory for the prompt and its answer"
SAMPLE = 12  # passages of the window that teaches the speller; identifiers of two digits occur


class ListwiseRanker:
    """A listwise bundle, loaded.

    `memory_backoffs` is how often a batch of windows was halved because memory ran out.
    """

    def __init__(
        self, model: LanguageModel, encoder: PromptEncoder, spec: ListwiseSpec, tokenizer: Tokenizer
    ) -> None:
        prompt = encoder.prompt
        grammar = Grammar(prompt.answer)
        vocabulary = Vocabulary.of(tokenizer, grammar, prompt.identifiers(spec.passages))
        self._budget = BUDGETS[model.device.partition(":")[0]]
        self._speller = Speller(tokenizer, grammar, vocabulary)
        self._decoder = PermutationDecoder(model, self._speller, self._budget.prefill_tokens)
        self._encoder = encoder
        self._rules = _rules(prompt, spec, tokenizer, model.end_ids)
        self._batch_tokens = spec.batch_tokens or model.cache_bytes // model.token_bytes
        self.device = model.device
        self.precision = model.precision
        self.wave_queries = self._budget.rows
        self.memory_backoffs = 0
        self._longest = 0  # prompt that was answered so far, in tokens
        self._teach(min(SAMPLE, spec.passages))

    @classmethod
    def open(cls, bundle: "Bundle", spec: ListwiseSpec, device: str) -> Self:
        """Load the weights; `auto` takes CUDA where there is one.

        Raises:
            ConfigurationError, UsageError: as `check_listwise`, or the device is not there.
            TryAgainError: there is no memory for the model, or for a small window.
            TrustError: the bundle was changed while it was being loaded.
        """
        encoder = check_listwise(bundle, spec)
        device = found_device(device)
        chosen: Precision = "fp32" if device == "cpu" else "bf16"
        precision = chosen if spec.precision == "auto" else spec.precision
        tokenizer = Tokenizer.from_file(str(bundle.file("tokenizer.json")))
        try:
            with memory_errors():
                model = LanguageModel.from_bundle(bundle, device, precision)
            bundle.check_unchanged()
            return cls(model, encoder, spec, tokenizer)
        except MemoryError as error:
            raise too_little_memory(f"load {bundle.folder}", f"{device}: {error}") from error

    @property
    def forwards(self) -> int:
        """Calls of the model so far, whatever their number of rows."""
        return self._decoder.forwards

    def rank(
        self,
        requests: Sequence[WindowRequest],
        done: Callable[[int], None] = lambda _windows: None,
    ) -> list[Permutation]:
        """Order windows that do not depend on each other; permutations in their order.

        Each has two passages or more. One that cannot be ordered fails alone, also one for
        which there is no memory. `done` is told the number of windows that are finished.

        Raises:
            TryAgainError: there is no memory for a window, and there was for a longer one.
        """
        prompts = self._encoder.encode([(r.query, r.passages) for r in requests])
        fitting = {i: p for i, p in enumerate(prompts) if p}
        results = {i: _failed(r, NO_ROOM) for i, r in enumerate(requests) if i not in fitting}
        for answers in self._answers(requests, fitting):
            results |= answers
            done(len(results))
        return [results[i] for i in range(len(requests))]

    def _answers(
        self, requests: Sequence[WindowRequest], prompts: dict[int, EncodedPrompt]
    ) -> Iterator[dict[int, Permutation]]:
        """Batch by batch, prompts of similar lengths together; smaller ones once memory ran out."""
        rows = self._rows(requests, prompts)
        slots = {i: slots_of(row) for i, row in rows.items()}
        waiting = sorted(rows, key=lambda i: (slots[i], i))
        most = self._batch_tokens
        while waiting:
            batch = waiting[: self._together([slots[i] for i in waiting], most)]
            said = self._attempt([rows[i] for i in batch])
            if said is not None and len(batch) > 1:
                gc.collect()  # what a cycle still holds
                self.memory_backoffs += 1
                most = len(batch) * slots[batch[-1]] // 2
                # What was written of these answers is void.
                rows |= self._rows(requests, {i: prompts[i] for i in batch})
                continue
            if said is None:
                yield {i: self._permutation(requests[i], prompts[i], rows[i]) for i in batch}
            else:
                self._check_longest(prompts[batch[0]], said)
                yield {batch[0]: _failed(requests[batch[0]], NO_MEMORY)}
            waiting = waiting[len(batch) :]

    def _rows(
        self, requests: Sequence[WindowRequest], prompts: dict[int, EncodedPrompt]
    ) -> dict[int, Row]:
        self._speller.forget()  # the first guesses, too, shall not depend on what came before
        return {i: self._row(len(requests[i].passages), prompt) for i, prompt in prompts.items()}

    def _together(self, slots: Sequence[int], most: int) -> int:
        """How many rows of rising lengths a batch takes: as many as rows and cache allow."""
        count = 1
        while count < min(len(slots), self._budget.rows) and (count + 1) * slots[count] <= most:
            count += 1
        return count

    def _attempt(self, rows: Sequence[Row]) -> str | None:
        """Decode a batch; where memory ran out, what was said.

        The frames that hold the failed attempt's tensors go with the exception, when this returns.
        """
        try:
            self._decoder.decode(rows)
        except MemoryError as error:
            return str(error)
        self._longest = max(self._longest, *(len(row.prompt) for row in rows))
        return None

    def _check_longest(self, prompt: EncodedPrompt, said: str) -> None:
        """A window for which memory never was is one thing; memory that is gone, another."""
        if len(prompt.ids) <= self._longest:
            what = f"order a single window of {len(prompt.ids)} tokens"
            raise too_little_memory(what, f"{self.device}: {said}")

    def _row(self, passages: int, prompt: EncodedPrompt) -> Row:
        identifiers = self._encoder.prompt.identifiers(passages)
        writer = Writer(self._speller, self._speller.grammar.start(identifiers))
        last = int(prompt.ids[-1])
        if self._rules:
            return Row(prompt.ids, writer, Reasoning(self._rules, writer, [last]))
        writer.begin([last])
        return Row(prompt.ids, writer)

    def _permutation(self, request: WindowRequest, prompt: EncodedPrompt, row: Row) -> Permutation:
        writer, thought = row.writer, row.reasoning
        first = self._encoder.prompt.first_identifier
        tokens = [*(thought.tokens if thought else []), *writer.tokens]
        answered = None if writer.failure else [int(c) - first for c in writer.state.chosen]
        places = tuple(answered or range(len(request.passages)))
        truncated = thought is not None and thought.truncated
        return Permutation(
            window=request.window,
            order=places,
            status="failed" if writer.failure else "truncated" if truncated else "ok",
            logprobs=tuple(writer.logprobs) if answered else (nan,) * len(places),
            text=self._speller.read(tokens) + writer.rest,
            detail=writer.failure or (thought.detail if thought else ""),
            prompt_sha256=prompt.sha256,
            prompt_tokens=len(prompt.ids),
            answer_tokens=len(tokens),
            forwards=row.forwards,
            overruled=row.overruled,
            cut_passages=prompt.cut_passages,
            shortened_passages=prompt.shortened_passages,
            neutralised_texts=prompt.neutralised_texts,
        )

    def _teach(self, passages: int) -> None:
        """Learn from a small window how this model spells what answers must hold."""
        (prompt,) = self._encoder.encode([("a", [f"passage {i}" for i in range(passages)])])
        if prompt:
            identifiers = self._encoder.prompt.identifiers(passages)
            writer = Writer(self._speller, self._speller.grammar.start(identifiers))
            writer.begin([int(prompt.ids[-1])])
            self._decoder.decode([Row(prompt.ids, writer)])
            self._longest = len(prompt.ids)
            self._speller.remember()


def _rules(
    prompt: Prompt, spec: ListwiseSpec, tokenizer: Tokenizer, end_ids: frozenset[int]
) -> Rules | None:
    if not spec.reasoning_tokens or prompt.reasoning is None:
        return None
    return Rules(tokenizer, prompt.reasoning.close, spec.reasoning_tokens, end_ids)


def _failed(request: WindowRequest, detail: str) -> Permutation:
    places = tuple(range(len(request.passages)))
    return Permutation(request.window, places, "failed", (nan,) * len(places), detail=detail)
