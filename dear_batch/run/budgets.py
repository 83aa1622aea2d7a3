"""How the rows and batches of a job are laid out: as its plan says, as was asked, or as is fastest.

What an engine needs for a token in each layout is timed at the start of the first job that is
large enough for it, and remembered in the user's cache folder by host, model, engine and device.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

from dear_batch.files.parquet import InputFile
from dear_batch.files.sample import sample
from dear_batch.pointwise.calibration import Rates, candidates, cheapest, cost, timed
from dear_batch.pointwise.recipe import EncodedPair
from dear_batch.pointwise.rows import Layout
from dear_batch.run.first_run import facts_of
from dear_batch.run.loading import Loaded
from dear_batch.run.plan import Plan
from dear_batch.run.watch import Watch
from dear_batch.specs import JobSpec
from dear_batch.user_cache import cache_file, read_cache, write_cache

CACHE = "calibration.json"
MAX_REMEMBERED = 512
PAYS = 100  # times what calibrating computes: at 2% or more of gain it is soon earned
LEAST_BYTES = 3  # of text that a token comes to, for a first guess
SAMPLE_FILES, SAMPLE_PLACES, SAMPLE_LISTS, SAMPLE_PAIRS = 4, 8, 64, 1024
Fields = dict[str, Any]


def layout_of(
    loaded: Loaded,
    spec: JobSpec,
    plan: Plan,
    known: Fields | None,
    watch: Watch,
    *,
    calibrates: bool = True,
) -> Layout:
    """The layout for the batches of a job; `known` is the runtime in its plan, if one is there.

    It scores nothing unless it `calibrates`.

    Raises:
        InputError: an input cannot be read.
        StoppedError: see `Watch.check`.
    """
    usual, execution = loaded.scorer.layout, spec.execution
    if known:
        return as_planned(usual, known)
    asked = execution.row_tokens or execution.batch_tokens
    # A compiled engine has its own; unpacked rows are as long as their pair.
    if asked or not calibrates or loaded.scorer.engine != "onnxruntime" or not usual.packed:
        return usual
    on_gpu = loaded.scorer.device != "cpu"
    layouts = candidates(usual, loaded.bundle.recipe.max_length, on_gpu=on_gpu)
    files = [source.file for output in plan.outputs for source in output.sources]
    text_bytes = sum(file.n_rows * file.row_bytes for file in files)
    if text_bytes / LEAST_BYTES < PAYS * cost(layouts):
        return usual
    pairs, share = _sample(loaded, files, spec.pointwise.depth)
    tokens = sum(map(len, pairs))
    if tokens < max(layout.batch_tokens for layout in layouts):
        return usual  # some layout would be timed on a batch that is not full
    if text_bytes * share < PAYS * cost(layouts):
        return usual
    rates = _rates(loaded, pairs, layouts, watch)
    return cheapest(pairs, rates) if rates else usual


def as_planned(usual: Layout, known: Fields | None) -> Layout:
    """The layout that a plan's runtime names, where it names one."""
    if known is None:
        return usual
    row_tokens = known["row_tokens"] or usual.row_tokens
    return replace(usual, row_tokens=row_tokens, batch_tokens=known["batch_tokens"])


def _sample(
    loaded: Loaded, files: Sequence[InputFile], depth: int | None
) -> tuple[list[EncodedPair], float]:
    """Some pairs of a job, and how many tokens a byte of its text comes to."""
    chosen = [
        files[i] for i in sorted({len(files) * i // SAMPLE_FILES for i in range(SAMPLE_FILES)})
    ]
    limits = {
        "places": SAMPLE_PLACES,
        "lists": SAMPLE_LISTS // len(chosen),
        "pairs": SAMPLE_PAIRS // len(chosen),
    }
    lists = [item for file in chosen for item in sample(file, **limits)]
    encoded = loaded.encoder.encode((query, texts[:depth]) for query, texts in lists)
    pairs = [pair for some in encoded for pair in some]
    text_bytes = sum(len(f"{title}{text}".encode()) for _, texts in lists for title, text in texts)
    return pairs, sum(map(len, pairs)) / max(1, text_bytes)


def _rates(
    loaded: Loaded, pairs: Sequence[EncodedPair], layouts: Sequence[Layout], watch: Watch
) -> Rates | None:
    """What the engine needs for a token in each layout: as remembered, else timed now.

    None where that takes too long, or where it cannot be remembered.
    """
    facts = {**facts_of(loaded.bundle, loaded.scorer, loaded.choice, loaded.machine)}
    facts["cores"] = loaded.machine.cores
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    known = _known()
    names = {f"{layout.row_tokens}/{layout.batch_tokens}": layout for layout in layouts}
    entry = known.get(key)
    seconds: Any = entry.get("seconds_a_token", ()) if isinstance(entry, dict) else ()
    if seconds is None:
        return None  # timing took too long the last time
    if _are_rates(seconds, names):
        return {layout: seconds[name] for name, layout in names.items()}
    begun = perf_counter()
    rates = timed(loaded.scorer, pairs, layouts, watch.check)
    found = {name: rates[at] for name, at in names.items()} if rates else None
    spent = round(perf_counter() - begun, 1)
    watch.log("calibrated", seconds=spent, seconds_a_token=found, why="once for each engine")
    known[key] = {**facts, "seconds_a_token": found}
    newest = dict(list(known.items())[-MAX_REMEMBERED:])
    write_cache(cache_file(CACHE), {"schema_version": 1, "engines": newest})
    # Where nothing is remembered, the same job again might choose other rows, and other bytes.
    return rates if key in _known() else None


def _known() -> dict[str, Any]:
    """What was timed here before."""
    fields = read_cache(cache_file(CACHE))
    if not isinstance(fields, dict) or fields.get("schema_version") != 1:
        return {}
    engines = fields.get("engines")
    return (
        {k: v for k, v in engines.items() if isinstance(v, dict)}
        if isinstance(engines, dict)
        else {}
    )


def _are_rates(found: Any, names: dict[str, Layout]) -> bool:
    return (
        isinstance(found, dict)
        and found.keys() == names.keys()
        and all(
            rate is None or (isinstance(rate, float) and math.isfinite(rate) and rate > 0)
            for rate in found.values()
        )
    )
