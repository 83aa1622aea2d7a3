"""What a job will take: its inputs read and judged for real, its tokens, time, cost and space.

Loads no model and no PyTorch, and ONNX Runtime only to see whether a GPU that is here is of use
to it: tokens are counted on a sample of pairs spread over all files. Writes nothing that stays.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from dear_batch.bundle import Bundle, open_bundle
from dear_batch.data import CandidateList, Refusal
from dear_batch.errors import EXIT_INCOMPLETE, UsageError, missing_extra
from dear_batch.files.durable import scratch_folder
from dear_batch.files.parquet import RowReader
from dear_batch.files.results import published_names
from dear_batch.listwise.encoding import PromptEncoder
from dear_batch.listwise.preflight import check_listwise
from dear_batch.listwise.prompts import load_prompt, passage_text
from dear_batch.listwise.windows import windows
from dear_batch.machine import machine
from dear_batch.pointwise.recipe import PairEncoder
from dear_batch.pointwise.selection import Choice, choose, told
from dear_batch.run.admission import Admitted
from dear_batch.run.folder import check_folder, finished
from dear_batch.run.listwise import NEEDED
from dear_batch.run.plan import Plan, plan_job
from dear_batch.run.planning import fitting_plan, wanted_now
from dear_batch.run.pointwise import admit
from dear_batch.run.rates import recall
from dear_batch.run.report import TOO_MANY_BAD, Tally
from dear_batch.run.sample import Spread
from dear_batch.run.space import Space, check_space
from dear_batch.specs import JobSpec, ListwiseSpec

DRY_RUN = "dry-run"
SAMPLE_PAIRS = 2048
SAMPLE_WINDOWS = 128
ROW_TOKENS = 256  # of packed rows, as ONNX Runtime gets them on a CPU
Fields = dict[str, Any]
Advance = Callable[[str, float, int], None]  # (stage, queries done, queries in all)


@dataclass(frozen=True, slots=True)
class Price:
    """How fast tokens go and what an hour costs, so far as the user says."""

    tokens_per_second: float | None = None
    per_hour: float | None = None


@dataclass(frozen=True, slots=True)
class _Pair:
    """Tokens of a sampled pair."""

    prefix: int
    document: int
    truncated: bool


@dataclass(slots=True)
class _Count:
    """What was read, and samples of what it is made of."""

    encoder: PairEncoder
    prompts: PromptEncoder | None
    tally: Tally = field(default_factory=Tally)
    pairs: int = 0
    windows: int = 0
    sample: Spread[_Pair] = field(default_factory=lambda: Spread(SAMPLE_PAIRS))
    prompt_sample: Spread[int | None] = field(default_factory=lambda: Spread(SAMPLE_WINDOWS))

    def add(self, item: Admitted | Refusal, spec: JobSpec) -> None:
        """Count a list that will be ranked, or something that is set aside."""
        if isinstance(item, Refusal):
            self.tally.refused(item)
            return
        self.tally.queries.written += 1
        self.tally.candidates.written += len(item.candidates)
        scored = item.candidates[: spec.pointwise.depth]
        self.pairs += len(scored)
        for candidate in scored:
            text = (candidate.title, candidate.text or "")
            self.sample.offer(partial(self._pair, item.query, text))
        if spec.listwise:
            self._windows(item, spec.listwise)

    def _pair(self, query: str, text: tuple[str, str]) -> _Pair:
        ((pair,),) = self.encoder.encode([(query, [text])])
        return _Pair(len(pair.prefix_ids), len(pair.document_ids), pair.truncated)

    def _windows(self, item: Admitted, spec: ListwiseSpec) -> None:
        """The windows of a list; their prompts are those of the first stage's order."""
        shown = item.candidates[: spec.depth]
        for start, end in windows(len(shown), spec.window, spec.stride):
            self.windows += 1
            if self.prompts and end - start > 1:
                texts = [passage_text(c.title, c.text or "") for c in shown[start:end]]
                self.prompt_sample.offer(partial(_prompt, self.prompts, item.query, texts))


def _prompt(encoder: PromptEncoder, query: str, passages: list[str]) -> int | None:
    """Tokens of a window's prompt, None where it does not fit."""
    (prompt,) = encoder.encode([(query, passages)])
    return None if prompt is None else len(prompt.ids)


def estimate(
    spec: JobSpec,
    *,
    stage: str = "all",
    restart: bool = False,
    price: Price | None = None,
    advance: Advance = lambda _stage, _done, _total: None,
    beat: Callable[[], None] = lambda: None,
) -> Fields:
    """Read all inputs of a job, and say what it will take; the fields of an outcome.

    `beat` is called wherever it may be left, and raises to leave it.

    Raises:
        DearBatchError: what a real run would end with before it loads a model.
    """
    if stage == "listwise":
        raise UsageError(
            "A dry run reads the inputs, and the second stage alone reads the parts of the first.",
            where="--stage listwise",
            valid="--stage all or pointwise with --dry-run",
        )
    listwise = spec.listwise if stage == "all" else None
    price = price or Price()
    folder = Path(spec.output.folder)
    check_folder(folder)
    wanted = wanted_now(spec, stage, folder)
    if not restart:  # which forgets whose folder it was
        fitting_plan(folder, wanted, stage)
    bundle, choice = _bundle(spec)
    beat()
    second = _listwise_bundle(listwise, paranoid=spec.execution.paranoid) if listwise else None
    encoder = PairEncoder.from_file(bundle.file("tokenizer.json"), bundle.recipe)
    place = next(parent for parent in folder.absolute().parents if parent.is_dir())
    with scratch_folder(place / folder.absolute().name) as scratch:
        plan = plan_job(spec, scratch, files=wanted.files, beat=beat)
        space = check_space(spec, plan)
        count = _Count(encoder, second[1] if second else None)
        _read(spec, plan, count, advance, beat)
    found = {**_counted(spec, plan, count), **_pointwise(spec, count, bundle, choice, price)}
    if listwise and second:
        found["listwise"] = _listwise(count, second[0], spec.execution.device)
    done = {"already_done": not restart and finished(folder) is not None}
    return {**_end(spec, count), **done, **found, **_total(found, price), "space": _space(space)}


def _bundle(spec: JobSpec) -> tuple[Bundle, Choice]:
    """The bundle, every file checked, and the engine that it would get."""
    execution = spec.execution
    bundle = open_bundle(spec.pointwise.bundle, task="pointwise", paranoid=execution.paranoid)
    return bundle, choose(bundle, machine(), execution.engine, execution.device)


def _listwise_bundle(spec: ListwiseSpec, *, paranoid: bool) -> tuple[Bundle, PromptEncoder | None]:
    """The bundle and, but for a chat prompt, whose template needs PyTorch, its encoder."""
    for package in NEEDED:
        if find_spec(package) is None:
            raise missing_extra(package, "listwise", "The listwise stage")
    bundle = open_bundle(spec.bundle, task="listwise", paranoid=paranoid)
    return bundle, None if load_prompt(spec.prompt).is_chat else check_listwise(bundle, spec)


def _read(
    spec: JobSpec, plan: Plan, count: _Count, advance: Advance, beat: Callable[[], None]
) -> None:
    """Every row through admission."""
    total, done = sum(output.n_queries for output in plan.outputs), 0

    def counted(lists: Iterator[CandidateList]) -> Iterator[CandidateList]:
        for item in lists:
            count.tally.candidates.read += len(item.candidates)
            yield item

    for source, shards in groupby(plan.shards, key=itemgetter(0)):
        places = plan.places(source)
        with RowReader(source.file) as reader:
            for _, shard in shards:
                lists = counted(reader.read(shard.first_row, shard.n_rows))
                for item in admit(spec, source, places, lists):
                    count.add(item, spec)
                    beat()
                done += shard.n_queries
                advance("dry run", done, total)
    count.tally.queries.read = done


def _counted(spec: JobSpec, plan: Plan, count: _Count) -> Fields:
    names = ("queries", "candidates", "quarantine_reasons", "skipped_reasons")
    figures = count.tally.to_json()
    return {
        "output": spec.output.folder,
        "inputs": [file.path for file in plan.inputs],
        "outputs": [published_names(output.stem)["run"] for output in plan.outputs],
        "shards": sum(1 for _ in plan.shards),
        **{name: figures[name] for name in names},
    }


def _pointwise(
    spec: JobSpec, count: _Count, bundle: Bundle, choice: Choice, price: Price
) -> Fields:
    pairs = count.sample.items
    row = spec.execution.row_tokens or (choice.plan.row_tokens if choice.plan else ROW_TOKENS)
    tokens = _tokens(count, packed=choice.engine != "torch", row=row)
    if bundle.recipe.pooling == "final-position":
        tokens = count.pairs * bundle.recipe.max_length
    rate, known_by = price.tokens_per_second, "given"
    if rate is None:
        rate = recall(bundle.sha256, choice.engine, choice.device)
        known_by = "earlier runs" if rate else "unknown"
    return {
        **told(choice),
        "scored_pairs": count.pairs,
        "sampled_pairs": len(pairs),
        "truncated_share": round(fmean(pair.truncated for pair in pairs), 4) if pairs else 0.0,
        "tokens": tokens,
        "tokens_per_second": rate,
        "rate_from": known_by,
        "seconds": round(tokens / rate, 1) if rate else None,
    }


def _tokens(count: _Count, *, packed: bool, row: int) -> int:
    """Tokens of all pairs; packed rows hold a query's prefix once each."""
    pairs = count.sample.items
    if not pairs:
        return 0
    prefix = fmean(pair.prefix for pair in pairs)
    documents = count.pairs * fmean(pair.document for pair in pairs)
    if not packed:
        return round(documents + count.pairs * prefix)
    prefixes = count.tally.queries.written + documents / max(1.0, row - prefix)
    return round(documents + min(count.pairs, prefixes) * prefix)


def _listwise(count: _Count, bundle: Bundle, device: str) -> Fields:
    """Windows are exact; those of a single passage and those that fail cost nothing."""
    lengths = [length for length in count.prompt_sample.items if length is not None]
    tokens = round(count.windows * fmean(lengths)) if lengths else None
    rate = recall(bundle.sha256, "torch", device)
    return {
        "windows": count.windows,
        "sampled_windows": len(lengths),
        "prompt_tokens": tokens,
        "tokens_per_second": rate,
        "seconds": round(tokens / rate, 1) if tokens is not None and rate else None,
    }


def _total(found: Fields, price: Price) -> Fields:
    """Time of both stages, where both are known, and its price."""
    stages = [found["seconds"], *([found["listwise"]["seconds"]] if "listwise" in found else [])]
    total = None if None in stages else round(sum(stages), 1)
    cost = total / 3600 * price.per_hour if total is not None and price.per_hour else None
    return {"total_seconds": total, "cost": None if cost is None else round(cost, 2)}


def _space(space: Space) -> Fields:
    return {"needed_bytes": space.needed, "there_bytes": space.there, "free_bytes": space.free}


def _end(spec: JobSpec, count: _Count) -> Fields:
    tally = count.tally
    bad = max(tally.queries.quarantined, tally.candidates.quarantined)
    too_many = bad > spec.input.bad_allowed(tally.candidates.read)
    return {
        "status": TOO_MANY_BAD if too_many else DRY_RUN,
        "exit_code": EXIT_INCOMPLETE if too_many else 0,
        "max_bad": str(spec.input.max_bad),
    }
