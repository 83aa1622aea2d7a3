"""Works through a part of one shard and writes nothing: for whoever looks for what kills it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dear_batch.data import Shard
from dear_batch.errors import ConfigurationError
from dear_batch.files.parquet import RowReader
from dear_batch.run import listwise, pointwise
from dear_batch.run.admission import Admitted
from dear_batch.run.blocks import Work, blocks, score_block
from dear_batch.run.budgets import as_planned
from dear_batch.run.folder import read_plan
from dear_batch.run.inputs import recorded_of_source
from dear_batch.run.ledger import Ledger
from dear_batch.run.loading import load_pointwise
from dear_batch.run.plan import Plan, Source
from dear_batch.run.planning import no_stage_one, outline, plan_again, wanted_now
from dear_batch.run.watch import Watch
from dear_batch.run.waves import rerank
from dear_batch.specs import JobSpec


def probe(
    spec: JobSpec,
    *,
    stage: str,
    shard: str,
    first: int = 0,
    end: int | None = None,
    watch: Watch | None = None,
) -> int:
    """Work through `first` to `end` of what a shard holds; returns how much that is in all.

    Candidates that are scored for stage "pointwise", lists for "listwise". Without an `end`
    they are only counted.

    Raises:
        ConfigurationError: the folder's plan has no such shard.
    """
    ledger, watch = Ledger(Path(spec.output.folder)), watch or Watch()
    fields = read_plan(ledger.folder)
    if fields is None:
        raise no_stage_one(ledger.folder)
    if stage == listwise.STAGE:
        return _probe_lists(spec, _group(fields, ledger, shard), first, end, watch)
    wanted = wanted_now(spec, "all", ledger.folder)
    plan = plan_again(fields, wanted, ledger, watch)
    for source, found in plan.shards:
        if found.key == shard:
            runtime = fields["runtime"][pointwise.STAGE]
            which = {"first": first, "end": end, "runtime": runtime}
            return _probe_candidates(spec, plan, source, found, watch, **which)
    raise _no_shard(ledger, shard)


def _no_shard(ledger: Ledger, shard: str) -> ConfigurationError:
    return ConfigurationError(f"The plan has no shard {shard}.", where=str(ledger.folder))


def _probe_candidates(
    spec: JobSpec,
    plan: Plan,
    source: Source,
    shard: Shard,
    watch: Watch,
    *,
    first: int,
    end: int | None,
    runtime: dict[str, Any] | None,
) -> int:
    depth = spec.pointwise.depth
    with RowReader(source.file) as reader:
        lists = reader.read(shard.first_row, shard.n_rows)
        items = pointwise.admit(spec, source, plan.places(source), lists)
        admitted = [item for item in items if isinstance(item, Admitted)]
    if end is not None:
        loaded = load_pointwise(spec.pointwise.bundle, spec.execution, watch)
        chosen, scorer = _within(admitted, first, end, depth), loaded.scorer
        scorer.layout = as_planned(scorer.layout, runtime)
        for block in blocks(chosen, loaded.encoder, depth, scorer.layout):
            score_block(block, scorer, Work(), lambda _share: watch.check())
    return sum(len(item.candidates[:depth]) for item in admitted)


def _within(
    admitted: Sequence[Admitted], first: int, end: int, depth: int | None
) -> Iterator[Admitted]:
    """The lists with no candidates but the scored ones from `first` to `end`."""
    start = 0
    for item in admitted:
        scored = item.candidates[:depth]
        chosen = slice(max(0, first - start), max(0, end - start))
        if scored[chosen]:
            ranks = item.first_ranks[: len(scored)][chosen]
            yield replace(item, candidates=scored[chosen], first_ranks=ranks)
        start += len(scored)


def _group(fields: dict[str, object], ledger: Ledger, shard: str) -> listwise.Group:
    shards = [item for output in outline(fields) for item in output.shards]
    commits = {}
    for item in shards:
        known = recorded_of_source(ledger, item.inputs)
        commit = ledger.found(pointwise.STAGE, item.key)
        if commit is None or commit.input_sha256 != known:
            raise no_stage_one(ledger.folder)
        commits[item.key] = commit
    for some in listwise.groups_of(outline(fields), commits, ledger):
        for group in some:
            if group.key == shard:
                return group
    raise _no_shard(ledger, shard)


def _probe_lists(
    spec: JobSpec, group: listwise.Group, first: int, end: int | None, watch: Watch
) -> int:
    if end is None or spec.listwise is None:
        return group.queries
    device = spec.execution.device
    bundle = listwise.prepare(spec.listwise, device)
    ranker = listwise.open_ranker(bundle, spec.listwise, device)
    chosen = [item for i, item in enumerate(listwise.lists_of(group)) if first <= i < end]
    for start in range(0, len(chosen), ranker.wave_queries):
        wave = chosen[start : start + ranker.wave_queries]
        rerank(wave, spec.listwise, ranker, lambda _share: watch.check())
    return group.queries
