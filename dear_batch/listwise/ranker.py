"""The listwise model of a job: windows in, permutations out, many at once.

Knows nothing of files, shards, or what becomes of an order.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import nan
from typing import TYPE_CHECKING, Self

from tokenizers import Tokenizer

from dear_batch.data import Permutation
from dear_batch.errors import missing_extra
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
SAMPLE = 12  # passages of the window that teaches the speller; identifiers of two digits occur


class ListwiseRanker:
    """A listwise bundle, loaded."""

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
        self._teach(min(SAMPLE, spec.passages))

    @classmethod
    def open(cls, bundle: "Bundle", spec: ListwiseSpec, device: str) -> Self:
        """Load the weights; `auto` takes CUDA where there is one.

        Raises:
            ConfigurationError, UsageError: as `check_listwise`, or the device is not there.
            TrustError: the bundle was changed while it was being loaded.
        """
        encoder = check_listwise(bundle, spec)
        device = found_device(device)
        chosen: Precision = "fp32" if device == "cpu" else "bf16"
        precision = chosen if spec.precision == "auto" else spec.precision
        model = LanguageModel.from_bundle(bundle, device, precision)
        tokenizer = Tokenizer.from_file(str(bundle.file("tokenizer.json")))
        bundle.check_unchanged()
        return cls(model, encoder, spec, tokenizer)

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

        Each has two passages or more. One that cannot be ordered fails alone. `done` is told
        the number of windows that are finished.
        """
        prompts = self._encoder.encode([(r.query, r.passages) for r in requests])
        fitting = {i: p for i, p in enumerate(prompts) if p}
        results = {i: _too_long(r) for i, r in enumerate(requests) if i not in fitting}
        rows = {i: self._row(len(requests[i].passages), p) for i, p in fitting.items()}
        for batch in self._batches(rows):
            self._decoder.decode([rows[i] for i in batch])
            for i in batch:
                results[i] = self._permutation(requests[i], fitting[i], rows[i])
            done(len(results))
        return [results[i] for i in range(len(requests))]

    def _batches(self, rows: dict[int, Row]) -> Iterator[list[int]]:
        """Prompts of similar lengths together, as many as rows and cache allow."""
        batch: list[int] = []
        for i in sorted(rows, key=lambda i: (slots_of(rows[i]), i)):
            full = len(batch) == self._budget.rows
            if batch and (full or (len(batch) + 1) * slots_of(rows[i]) > self._batch_tokens):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

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
            self._speller.remember()


def _rules(
    prompt: Prompt, spec: ListwiseSpec, tokenizer: Tokenizer, end_ids: frozenset[int]
) -> Rules | None:
    if not spec.reasoning_tokens or prompt.reasoning is None:
        return None
    return Rules(tokenizer, prompt.reasoning.close, spec.reasoning_tokens, end_ids)


def _too_long(request: WindowRequest) -> Permutation:
    places = tuple(range(len(request.passages)))
    detail = "the query leaves no room for the passages"
    return Permutation(request.window, places, "failed", (nan,) * len(places), detail=detail)
