"""A benchmark beside the run itself: the same pairs and tokens, and sums that add up."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dear_batch.errors import ConfigurationError, InputError
from dear_batch.files.parquet import open_input
from dear_batch.files.sample import sample_lists
from dear_batch.pointwise import ceiling
from dear_batch.pointwise.ceiling import Ceiling, flops_per_token
from dear_batch.run import bench
from dear_batch.run.bench import CPU_STAGES, PASSES, CpuSide, Measured, Scoring, measure, taken_from
from dear_batch.run.bench_figures import figures
from dear_batch.run.local import run_job
from dear_batch.specs import ExecutionSpec, InputSpec, JobSpec, OutputSpec, PointwiseSpec
from tests.conftest import collection_queries, collection_texts

Make = Callable[..., Path]
LISTS, DOCUMENTS = 9, 8


def rows() -> list[dict[str, Any]]:
    """A text is missing here and there, and one query is blank."""
    texts, queries = collection_texts(), collection_queries()
    found: list[dict[str, Any]] = [
        {
            "qid": f"q{i}",
            "query": f"{queries[i % len(queries)]} {i}",
            "candidates": [
                {"docid": f"d{k}", "text": texts[(5 * i + k) % len(texts)]}
                for k in range(DOCUMENTS)
            ],
        }
        for i in range(LISTS)
    ]
    found[3]["candidates"][4]["text"] = None
    found[5]["query"] = " "
    return found


def write(path: Path, *, flat: bool = False) -> Path:
    nested = rows()
    if flat:
        nested = [
            {"qid": row["qid"], "query": row["query"], **candidate}
            for row in nested
            for candidate in row["candidates"]
        ]
    pq.write_table(pa.Table.from_pylist(nested), path, row_group_size=2)
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "LEAST_S", 0.001)


@pytest.mark.model
@pytest.mark.parametrize("flat", [False, True])
def test_it_scores_what_a_run_scores(flat: bool, bundle: Make, tmp_path: Path) -> None:
    path, folder = write(tmp_path / "in.parquet", flat=flat), str(bundle("llama31"))
    execution = ExecutionSpec(row_tokens=512, batch_tokens=512)
    measured = measure(folder, path, execution, pairs=10**6)
    assert {p.name for p in tmp_path.iterdir()} == {"in.parquet"}
    found = figures(measured)
    spec = JobSpec(
        InputSpec((str(path),), "50%"),
        PointwiseSpec(folder),
        OutputSpec(str(tmp_path / "out")),
        execution=execution,
    )
    report = run_job(spec)
    assert found["pairs"] == report["scored_pairs"] == (LISTS - 1) * DOCUMENTS - 1
    for name in ("tokens", "truncated_pairs", "engine", "device", "memory_backoffs"):
        assert found[name] == report[name], name
    assert found["padding_share"] == pytest.approx(report["padding_share"], abs=1e-4)
    assert found["lists"] == LISTS - 1
    assert found["real_tokens"] > found["tokens"]  # prefixes are shared
    assert all(
        replace(p, seconds=0) == replace(measured.scoring[0], seconds=0) for p in measured.scoring
    )
    assert {one.real_tokens for one in measured.cpu_side} == {found["real_tokens"]}


@pytest.mark.model
def test_a_sample_of_so_many_pairs(bundle: Make, tmp_path: Path) -> None:
    told: list[tuple[str, float, int]] = []
    path = write(tmp_path / "in.parquet")
    execution = ExecutionSpec(engine="torch")
    measured = measure(
        bundle("llama31"), path, execution, pairs=11, advance=lambda *item: told.append(item)
    )
    assert measured.lists == 2
    assert [one.work.pairs for one in measured.scoring] == [11] * PASSES
    names = ["warm-up", *(f"pass {n + 1} of {PASSES}" for n in range(PASSES))]
    assert list(dict.fromkeys(name for name, _, _ in told)) == names
    assert {total for _, _, total in told} == {11}
    assert [done for name, done, _ in told if name == names[-1]][-1] == 11
    assert all(one.seconds > 0 for one in measured.scoring)
    for found in measured.cpu_side:
        assert set(found.seconds) == set(CPU_STAGES)
        assert all(value > 0 for value in found.seconds.values())
        assert found.real_tokens > measured.scoring[0].real_tokens  # of all pairs that there are
    assert measured.ceiling.by == "torch"
    assert figures(measured)["prefix_share"] == pytest.approx(0, abs=1e-9)  # one pair a row


@pytest.mark.model
def test_as_many_pairs_as_the_time_allows(
    bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 10 ms a pair, 2 seconds are 200 pairs, 50 in each of the 4 passes; or all there are."""
    folder, path = bundle("llama31"), write(tmp_path / "in.parquet")
    scoring, tried = bench._Bench.scoring, list[int]()

    def slow(self: Any, lists: Any, name: str) -> Scoring:
        found = scoring(self, lists, name)
        tried.append(found.work.pairs)
        return replace(found, seconds=0.01 * tried[-1])

    monkeypatch.setattr(bench._Bench, "scoring", slow)
    measure(folder, path, seconds=2)
    assert tried == [16, *[50] * 4]
    tried.clear()
    measure(folder, path, seconds=40)
    assert tried == [16, *[63] * 5]


def test_what_is_taken(tmp_path: Path) -> None:
    file = open_input(write(tmp_path / "in.parquet"))
    lists = list(bench._admitted(file, sample_lists(file)))
    for pairs in (1, 8, 9, 20, 62, 63, 1000):
        taken = taken_from(lists, pairs)
        assert sum(len(item.candidates) for item in taken) == min(pairs, 63)
        assert sum(len(item.candidates) < 7 for item in taken) <= 1  # the last list is cut
        assert [item.read.row for item in taken] == sorted(item.read.row for item in taken)
        assert all(len(item.candidates) == len(item.first_ranks) for item in taken)
    assert taken_from(lists, 1000) == lists
    halves = [item.read.row > LISTS // 2 for item in taken_from(lists, 4 * DOCUMENTS)]
    assert 0 < sum(halves) < len(halves)


@pytest.mark.model
def test_wrong_inputs(bundle: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "in.parquet")
    with pytest.raises(InputError):
        measure(bundle("llama31"), tmp_path / "missing.parquet")
    with pytest.raises(ConfigurationError, match="is not a bundle"):
        measure(tmp_path, path)
    columns = {name: [" "] for name in ("qid", "query", "docid", "text")}
    pq.write_table(pa.table(columns), path)
    with pytest.raises(InputError, match="None of the candidates"):
        measure(bundle("llama31"), path)


@pytest.fixture
def measured(bundle: Make, tmp_path: Path) -> Measured:
    """Of a real bundle, with round times: 1,000 real tokens in 10 seconds, on 2 cores."""
    found = measure(bundle("llama31"), write(tmp_path / "in.parquet"), pairs=10)
    work = replace(found.scoring[0].work, pairs=10, tokens=900, computed_tokens=1200)
    scoring = tuple(Scoring(work, 1000, seconds) for seconds in (90.0, 0.0, 10.0))
    # For twice as many tokens; one measurement is too fast, and one too slow.
    seconds = {"read": 0.2, "tokenise": 1.2, "plan": 0.4, "write": 0.2}
    sides = [
        CpuSide(2000, {name: by * value for name, value in seconds.items()}, by * 0.4, by * 1.6)
        for by in (9, 0, 1)
    ]
    loaded = replace(found.loaded, machine=replace(found.loaded.machine, cores=2))
    best = Ceiling(1e9, "onnxruntime", "fp32", 512)
    return replace(found, loaded=loaded, scoring=scoring, cpu_side=tuple(sides), ceiling=best)


@pytest.mark.model
def test_the_sums(measured: Measured) -> None:
    found = figures(measured, price_per_hour=36, volume=5000)
    # Of tokenising, 0.2 s run on one core and 0.8 s on all.
    assert found["cpu_side_real_tokens_per_second"] == pytest.approx(1000 / 1.0, rel=1e-3)
    assert found["cpu_side_real_tokens_per_second_16_cores"] == pytest.approx(
        1000 / (0.6 + 0.8 / 16), rel=1e-3
    )
    total = 10 + (0.1 + 1.0 + 0.2 + 0.1) / 2  # the engine shares both cores with the rest
    assert found["pairs_per_second"] == pytest.approx(10 / total, rel=1e-3)
    assert found["real_tokens_per_second"] == pytest.approx(1000 / total, rel=1e-3)
    assert found["computed_tokens_per_second"] == 120
    assert found["engine_share"] == pytest.approx(10 / total, rel=1e-3)
    assert found["engine_share_in_turn"] == pytest.approx(10 / 11, rel=1e-3)
    assert found["prefix_share"] == pytest.approx(0.1)
    assert found["padding_share"] == pytest.approx(0.25)
    assert found["flops_per_token"] == flops_per_token(measured.config, packed=True)
    reached = found["flops_per_token"] * 120
    assert found["flops_per_second"] == pytest.approx(reached, rel=1e-3)
    assert found["ceiling_share"] == pytest.approx(reached / 1e9, rel=1e-3)
    assert found["million"]["seconds"] == pytest.approx(1e5 * total, rel=1e-3)
    assert found["million"]["cost"] == pytest.approx(1e3 * total, rel=1e-3)
    assert found["volume"]["candidates"] == 5000
    assert found["volume"]["seconds"] == pytest.approx(500 * total, rel=1e-3)
    assert found["score_seconds"] == [90, 0, 10]
    assert found["seconds"] == {
        "read": 0.1,
        "tokenise": 0.6,
        "plan": 0.2,
        "write": 0.1,
        "score": 10,
    }
    json.dumps(found, allow_nan=False)


@pytest.mark.model
def test_beside_an_engine_of_its_own_the_slower_side_decides(measured: Measured) -> None:
    """On a GPU the cores are free; where they are slower, they are what a job waits for."""
    measured.loaded.scorer.device = "cuda:0"
    assert figures(measured)["engine_share"] == 1
    assert figures(measured)["pairs_per_second"] == 1
    quick = tuple(replace(one, seconds=0.25) for one in measured.scoring)
    found = figures(replace(measured, scoring=quick))
    assert found["engine_share"] == pytest.approx(0.25)
    assert found["real_tokens_per_second"] == found["cpu_side_real_tokens_per_second"]


@pytest.mark.model
def test_a_price_a_volume_and_a_ceiling_may_be_unknown(measured: Measured) -> None:
    unknown = replace(measured, ceiling=Ceiling(None, "onnxruntime", "fp16", why="no CUDA"))
    found = figures(unknown)
    assert (found["volume"], found["million"]["cost"], found["ceiling_share"]) == (None,) * 3
    assert found["ceiling"]["why_not"] == "no CUDA"
