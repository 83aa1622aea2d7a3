"""Jobs of two stages: a real first stage on a tiny bundle, a second whose answers are known."""

import json
import sys
import weakref
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dear_batch.bundle import hash_file, open_bundle
from dear_batch.errors import ConfigurationError, DearBatchError, UsageError
from dear_batch.files import parts
from dear_batch.files.parts import RERANKED_SCHEMA, TEXT_SCHEMA
from dear_batch.files.results import RERANKED_RESULTS_SCHEMA, TRANSCRIPTS_SCHEMA
from dear_batch.pointwise.scorer import Scorer, open_scorer
from dear_batch.run import blocks, listwise, loading, planning
from dear_batch.run.folder import finished, sealed, unsealed
from dear_batch.run.local import run_job
from dear_batch.specs import ExecutionSpec, JobSpec, ListwiseSpec, OutputSpec
from tests.run.fake_ranker import Fake, install, listwise_bundle, slid
from tests.run.test_local import (
    END,
    QUARANTINE,
    SIZE,
    WORK,
    Failing,
    Recorder,
    _rows,
    counts,
    job,
    names,
    nested,
    order,
    report_of,
    run_lines,
    small_shards,
    states,
    without_lock,
)

pytestmark = pytest.mark.model
Make = Callable[..., Path]
Row = dict[str, Any]
DEPTH, WINDOW, STEP = 8, 5, 3
WINDOWS = 2  # [3, 8), [0, 5)
PUBLISHED = WORK | END | {"run.trec", "results.parquet", "transcripts.parquet"}
SAME = ("run.trec", "results.parquet", "transcripts.parquet")


@pytest.fixture
def rows() -> list[Row]:
    return [dict(row) for row in _rows()[:8]]


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return listwise_bundle(tmp_path_factory.mktemp("bundles") / "listwise")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return install(monkeypatch)


@pytest.fixture
def spec(bundle: Make, generator: Path, tmp_path: Path, rows: list[Row]) -> JobSpec:
    """A job of two stages over all queries, into `out`."""
    one = job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", rows))
    stage = ListwiseSpec(str(generator), depth=DEPTH, window=WINDOW, step=STEP)
    return replace(one, listwise=stage)


def into(spec: JobSpec, folder: Path) -> JobSpec:
    return replace(spec, output=replace(spec.output, folder=str(folder)))


def other(spec: JobSpec, **settings: Any) -> JobSpec:
    assert spec.listwise
    return replace(spec, listwise=replace(spec.listwise, **settings))


def part_of(folder: Path, stage: str = "pointwise", at: int = 0) -> Path:
    """The part that a commit of a stage names."""
    commit = sorted((folder / "commits" / stage).iterdir())[at]
    return folder / str(json.loads(commit.read_text())["files"]["part"]["name"])


def table(path: Path) -> list[Row]:
    return pq.read_table(path).to_pylist()


def texts(rows: list[Row]) -> dict[tuple[str, str], str]:
    """What a prompt shows of each candidate."""
    return {
        (row["qid"], c["docid"]): f"{c['title']} {c['text']}" if c["title"] else c["text"]
        for row in rows
        for c in row["candidates"]
    }


@pytest.fixture
def first_stage(spec: JobSpec, tmp_path: Path) -> dict[str, list[str]]:
    """The order that the first stage alone publishes."""
    run_job(replace(into(spec, tmp_path / "first"), listwise=None))
    return order(tmp_path / "first")


def expected(first: dict[str, list[str]], rows: list[Row]) -> dict[str, list[str]]:
    passages = texts(rows)
    return {
        qid: [
            docids[place] for place in slid([passages[qid, d] for d in docids], DEPTH, WINDOW, STEP)
        ]
        for qid, docids in first.items()
    }


# What is published.


def test_the_top_is_in_the_order_of_the_second_stage(
    fake: Fake, spec: JobSpec, tmp_path: Path, rows: list[Row], first_stage: dict[str, list[str]]
) -> None:
    run_job(spec)
    assert order(tmp_path / "out") == expected(first_stage, rows)
    assert order(tmp_path / "out") != first_stage
    assert names(tmp_path / "out") == PUBLISHED
    assert names(tmp_path / "out" / "commits") == {"input", "pointwise", "listwise"}
    assert len(names(tmp_path / "out" / "parts")) == 3  # of either stage, and the transcripts
    assert pq.read_schema(part_of(tmp_path / "out")).equals(TEXT_SCHEMA)
    assert pq.read_schema(part_of(tmp_path / "out", "listwise")).equals(RERANKED_SCHEMA)
    assert spec.listwise
    ((bundle, asked, device),) = fake.opened
    assert (str(bundle.folder), asked, device) == (spec.listwise.bundle, spec.listwise, "auto")


def test_scores_are_those_of_the_first_stage_in_the_new_order(
    fake: Fake, spec: JobSpec, tmp_path: Path, first_stage: dict[str, list[str]]
) -> None:
    run_job(spec)
    lists, before = (run_lines(tmp_path / f / "run.trec") for f in ("out", "first"))
    assert fake.ranker.requests
    for qid in first_stage:
        assert [score for _, score in lists[qid]] == [score for _, score in before[qid]]


def test_results_say_what_each_stage_made_of_a_document(
    fake: Fake, spec: JobSpec, tmp_path: Path, first_stage: dict[str, list[str]]
) -> None:
    fake.ranker.fails = lambda r: (
        r.window.qid == "q3" or (r.window.qid, r.window.start) == ("q5", 3)
    )
    run_job(spec)
    found = pq.read_table(tmp_path / "out" / "results.parquet")
    assert found.schema.equals(RERANKED_RESULTS_SCHEMA)
    assert found.schema.metadata[b"schema_version"] == b"1"
    before = {(r["qid"], r["docid"]): r for r in table(tmp_path / "first" / "results.parquet")}
    final = order(tmp_path / "out")
    for r in found.to_pylist():
        was = before[r["qid"], r["docid"]]
        assert [r[n] for n in ("logit", "first_score", "first_rank")] == [
            was[n] for n in ("logit", "first_score", "first_rank")
        ]
        assert r["pointwise_rank"] == was["rank"]
        assert r["rank"] == final[r["qid"]].index(r["docid"]) + 1
        if r["rank"] > DEPTH:
            rest = (r["listwise_rank"], r["window_status"], r["choice_logprob"])
            assert rest == (None, None, None)
            assert r["rank"] == r["pointwise_rank"]
            continue
        failed = r["qid"] == "q3" or (r["qid"] == "q5" and r["rank"] > WINDOW)
        assert r["listwise_rank"] == r["rank"]
        assert r["window_status"] == ("failed" if failed else "ok")
        place = r["rank"] - 1 if r["rank"] <= WINDOW else r["rank"] - 1 - STEP
        assert r["choice_logprob"] == (None if failed else -0.25 * (WINDOW - 1 - place))
    assert final["q3"] == first_stage["q3"]
    assert final["q5"][WINDOW:] == first_stage["q5"][WINDOW:]
    assert final["q5"] != first_stage["q5"]


def test_transcripts_hold_every_window(
    fake: Fake, spec: JobSpec, tmp_path: Path, rows: list[Row], first_stage: dict[str, list[str]]
) -> None:
    fake.ranker.fails = lambda r: r.window.qid == "q1" and r.window.start == 0
    run_job(spec)
    found = pq.read_table(tmp_path / "out" / "transcripts.parquet")
    assert found.schema.equals(TRANSCRIPTS_SCHEMA)
    lines, final = found.to_pylist(), order(tmp_path / "out")
    assert [(r["qid"], r["window"], r["start"], r["end"]) for r in lines] == [
        window for row in rows for window in ((row["qid"], 0, 3, 8), (row["qid"], 1, 0, 5))
    ]
    for r in lines:
        if r["window"]:
            assert r["order"] == final[r["qid"]][:WINDOW]
        else:
            assert set(r["order"]) == set(first_stage[r["qid"]][3:8])
            assert r["order"][2:] == final[r["qid"]][WINDOW:DEPTH]
    (failed,) = [r for r in lines if r["status"] == "failed"]
    assert (failed["qid"], failed["detail"], failed["text"]) == (
        "q1",
        "the prompt does not fit",
        "",
    )
    assert failed["logprobs"] == [None] * WINDOW
    whole = lines[0]
    assert (whole["status"], whole["detail"]) == ("ok", "")
    assert whole["logprobs"] == [-1.0, -0.75, -0.5, -0.25, 0.0]
    assert whole["text"].count("[") == WINDOW
    assert len(whole["prompt_sha256"]) == 64
    sums = ("prompt_tokens", "answer_tokens", "forwards", "overruled", "cut_passages")
    assert [whole[name] for name in sums] == [50, 20, 1, 1, 2]
    assert whole["shortened_passages"] == 3


def test_the_report_counts_both_stages(
    fake: Fake, spec: JobSpec, generator: Path, tmp_path: Path, rows: list[Row]
) -> None:
    fake.ranker.fails = lambda r: r.window.qid in {"q1", "q2"} and r.window.start > 0
    report = run_job(other(spec, max_failed_windows="50%"))
    assert report == report_of(tmp_path / "out")
    n = len(rows)
    assert report["status"] == "ok"
    assert report["outputs"] == ["run.trec"]
    assert report["queries"] == counts(n, n)
    assert report["scored_pairs"] == n * SIZE
    shards = {"done": 1, "kept": 0}
    assert report["shards"] == {"pointwise": shards, "listwise": shards}
    found = report["listwise"]
    assert (found["bundle"], found["bundle_sha256"]) == (
        str(generator),
        open_bundle(generator).sha256,
    )
    assert (found["prompt"], found["device"], found["precision"]) == ("readme", "cpu", "fp32")
    assert [found[k] for k in ("depth", "window", "step")] == [DEPTH, WINDOW, STEP]
    assert found["queries"] == n
    total = n * WINDOWS
    statuses = {"ok": total - 2, "truncated": 0, "kept": 0, "failed": 2}
    assert found["windows"] == {"total": total, **statuses}
    assert found["failed_reasons"] == {"the prompt does not fit": 2}
    assert found["prompt_tokens"] == 10 * WINDOW * total
    assert found["answer_tokens"] == 4 * WINDOW * (total - 2)
    assert (found["forwards"], found["overruled"]) == (total, total - 2)
    assert (found["cut_passages"], found["shortened_passages"]) == (2 * total - 4, 3 * total - 6)
    assert set(found["seconds"]) == {"load", "read", "rank", "write"}
    transcripts = table(tmp_path / "out" / "transcripts.parquet")
    assert len(transcripts) == total
    assert sum(t["prompt_tokens"] for t in transcripts) == found["prompt_tokens"]


def test_progress_of_each_stage_grows_to_the_number_of_queries(
    fake: Fake, spec: JobSpec, rows: list[Row]
) -> None:
    watch = Recorder()
    run_job(spec, watch)
    calls = watch.calls
    assert [*dict.fromkeys(call[0] for call in calls)] == ["pointwise", "listwise"]
    for stage in ("pointwise", "listwise"):
        done = [call[1] for call in calls if call[0] == stage]
        assert done[0] == 0
        assert done == sorted(done)
        assert done[-1] == len(rows)
    assert {call[2] for call in calls} == {len(rows)}
    waves = [len({r.window.qid for r in w}) for w in fake.ranker.requests]
    assert max(waves) == fake.ranker.wave_queries


@pytest.mark.parametrize("what", ["text", "candidates"])
def test_memory_bounds_a_wave_too(
    what: str, fake: Fake, spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_job(spec)
    if what == "candidates":
        monkeypatch.setattr(parts, "CANDIDATE_BYTES", 1 << 20)
    monkeypatch.setattr(listwise, "WAVE_BYTES", SIZE << 20 if what == "candidates" else 1)
    fake.ranker.requests.clear()
    run_job(into(spec, tmp_path / "small"))
    assert {len(wave) for wave in fake.ranker.requests} == {1}
    for name in SAME:
        assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_one_run_an_input(
    fake: Fake, spec: JobSpec, tmp_path: Path, rows: list[Row], first_stage: dict[str, list[str]]
) -> None:
    paths = (nested(tmp_path / "1.parquet", rows[:5]), nested(tmp_path / "2.parquet", rows[3:]))
    several = OutputSpec(str(tmp_path / "out"), run_per_input=True)
    report = run_job(replace(spec, input=replace(spec.input, paths=paths), output=several))
    kinds = ("trec", "results.parquet", "transcripts.parquet")
    published = {f"{i}.{kind}" for i in (1, 2) for kind in kinds}
    assert names(tmp_path / "out") == WORK | END | published
    assert report["shards"]["listwise"] == {"done": 2, "kept": 0}  # never over two outputs
    assert report["outputs"] == ["1.trec", "2.trec"]
    assert report["listwise"]["queries"] == len(rows) + 2
    wanted = expected(first_stage, rows)
    assert order(tmp_path / "out", "1") == {row["qid"]: wanted[row["qid"]] for row in rows[:5]}
    assert order(tmp_path / "out", "2") == {row["qid"]: wanted[row["qid"]] for row in rows[3:]}
    assert fake.opened[1:] == []  # one model for both


def test_short_lists_and_what_was_set_aside(
    fake: Fake, bundle: Make, generator: Path, tmp_path: Path, rows: list[Row]
) -> None:
    """Trap 14: a list shorter than a window gets its pass, a list of one needs none."""
    lists = [
        {**rows[0], "candidates": rows[0]["candidates"][:1]},
        {**rows[1], "candidates": rows[1]["candidates"][:2]},
        {**rows[2], "query": None},
        {
            **rows[3],
            "candidates": [{**rows[3]["candidates"][0], "text": None}, *rows[3]["candidates"][1:4]],
        },
    ]
    one = job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", lists))
    report = run_job(replace(one, listwise=ListwiseSpec(str(generator))))
    assert report["queries"] == counts(4, 3, 1)
    assert report["listwise"]["windows"] == {
        "total": 3,
        "ok": 2,
        "truncated": 0,
        "kept": 1,
        "failed": 0,
    }
    (asked,) = fake.ranker.requests
    assert [len(r.passages) for r in asked] == [2, 3]
    assert names(tmp_path / "out") == PUBLISHED | QUARANTINE
    kept = table(tmp_path / "out" / "transcripts.parquet")[0]
    assert (kept["qid"], kept["status"], kept["logprobs"], kept["prompt_sha256"]) == (
        "q0",
        "kept",
        [None],
        "",
    )
    for row, docids in zip(
        [lists[0], lists[1], lists[3]], order(tmp_path / "out").values(), strict=True
    ):
        passages = texts([row])
        values = {c["docid"] for c in row["candidates"] if c["text"]}
        best = slid([passages[row["qid"], d] for d in sorted(values)], 30, 20, 10)
        assert docids == [sorted(values)[place] for place in best]


def test_a_job_of_which_nothing_is_left_ends_well(
    fake: Fake, spec: JobSpec, tmp_path: Path, rows: list[Row]
) -> None:
    nested(tmp_path / "in.parquet", [{**rows[0], "query": ""}])
    report = run_job(spec)
    assert report["queries"] == counts(1, 0, 1)
    assert report["listwise"]["windows"]["total"] == 0
    assert report["status"] == "too-many-bad"
    assert fake.ranker.requests == []
    assert (tmp_path / "out" / "run.trec").read_text() == ""
    assert table(tmp_path / "out" / "transcripts.parquet") == []


def test_the_second_stage_may_reach_below_the_first(
    fake: Fake, spec: JobSpec, tmp_path: Path
) -> None:
    run_job(replace(spec, pointwise=replace(spec.pointwise, depth=2)))
    results = table(tmp_path / "out" / "results.parquet")
    reached = [r for r in results if r["rank"] <= 2 and r["pointwise_rank"] > 2]
    assert reached
    assert all(r["logit"] is None for r in reached)
    run_lines(tmp_path / "out" / "run.trec")
    assert fake.ranker.requests


# Memory: never two models, never a whole part.


def test_the_scorer_is_gone_before_the_other_model_loads(
    fake: Fake, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorers: list[weakref.ref[Scorer]] = []
    alive: list[bool] = []

    def opened(*arguments: Any, **options: Any) -> Scorer:
        assert fake.opened == []
        scorer = open_scorer(*arguments, **options)
        scorers.append(weakref.ref(scorer))
        return scorer

    monkeypatch.setattr(loading, "open_scorer", opened)
    fake.on_open = lambda: alive.extend(ref() is not None for ref in scorers)
    run_job(spec)
    assert alive == [False]


# The stages apart.


def split(spec: JobSpec) -> dict[str, Any]:
    run_job(spec, stage="pointwise")
    return run_job(spec, stage="listwise")


TIMES = {"seconds", "tokens_per_second", "idle_share"}


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what differs from run to run."""
    found = {k: v for k, v in report.items() if k not in TIMES}
    found["listwise"] = {k: v for k, v in report["listwise"].items() if k != "seconds"}
    return found


def test_the_stages_apart_give_the_bytes_of_both_together(
    fake: Fake, spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.ranker.fails = lambda r: r.window.qid == "q4"
    together = run_job(spec)
    apart = split(into(spec, tmp_path / "apart"))
    for name in SAME:
        assert (tmp_path / "apart" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert apart["shards"].pop("pointwise") == {"done": 1, "kept": 1}
    assert together["shards"].pop("pointwise") == {"done": 1, "kept": 0}
    assert without_times(apart) == without_times(together)
    monkeypatch.setattr(loading, "open_scorer", None)  # the second stage alone needs no scorer
    before = states(tmp_path / "apart")
    for stage in ("pointwise", "listwise", "all"):
        again = run_job(into(spec, tmp_path / "apart"), stage=stage)  # type: ignore[arg-type]
        assert again["already_done"]
    assert without_lock(states(tmp_path / "apart")) == without_lock(before)


def test_the_first_stage_alone_leaves_parts_and_says_so(
    fake: Fake, spec: JobSpec, tmp_path: Path, rows: list[Row]
) -> None:
    rows[2]["query"] = None
    nested(tmp_path / "in.parquet", rows)
    report = run_job(spec, stage="pointwise")
    assert (report["status"], report["exit_code"]) == ("listwise-outstanding", 0)
    assert report["outputs"] == []
    assert report["queries"] == counts(len(rows), len(rows) - 1, 1)
    assert "listwise" not in report
    assert report_of(tmp_path / "out") == report
    assert names(tmp_path / "out") == WORK | {"quarantine"}
    assert fake.checked == []  # its packages may be on another machine
    assert fake.opened == []
    part = table(part_of(tmp_path / "out"))
    assert len(part) == (len(rows) - 1) * SIZE
    for at in range(0, len(part), SIZE):
        ranks = [row["rank"] for row in part[at : at + SIZE]]
        assert ranks == list(range(1, SIZE + 1))
        assert len({row["qid"] for row in part[at : at + SIZE]}) == 1
        with_text = [row["text"] is not None for row in part[at : at + SIZE]]
        assert with_text == [k < DEPTH for k in range(SIZE)]
    run_job(spec, stage="pointwise")  # again, and nothing is scored twice
    run_job(spec, stage="listwise")
    assert names(tmp_path / "out") == PUBLISHED | QUARANTINE
    (refusal,) = table(tmp_path / "out" / "quarantine.parquet")
    assert (refusal["row"], refusal["reason"]) == (2, "empty_query")
    before = states(tmp_path / "out")
    run_job(spec, stage="pointwise")  # the run of these settings stays
    assert without_lock(states(tmp_path / "out")) == without_lock(before)
    assert run_job(spec, stage="listwise")["status"] == "too-many-bad"


def test_the_first_stage_alone_needs_no_listwise_bundle(
    fake: Fake, spec: JobSpec, tmp_path: Path, generator: Path
) -> None:
    """It may lie on the machine of the second stage alone."""
    run_job(into(spec, tmp_path / "whole"))
    run_job(other(spec, bundle=str(tmp_path / "elsewhere")), stage="pointwise")
    assert report_of(tmp_path / "out")["status"] == "listwise-outstanding"
    run_job(other(spec, bundle=str(generator)), stage="listwise")
    for name in SAME:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(fake.opened) == 2


def test_the_second_stage_again_with_other_settings(
    fake: Fake, spec: JobSpec, tmp_path: Path
) -> None:
    run_job(spec)
    part = part_of(tmp_path / "out").stat()
    narrow = other(spec, window=4, step=2)
    with pytest.raises(ConfigurationError, match="another job") as caught:
        run_job(narrow)
    assert "--stage listwise" in caught.value.next_step
    report = run_job(narrow, stage="listwise")
    assert report["listwise"]["window"] == 4
    assert report["shards"]["pointwise"] == {"done": 1, "kept": 1}
    assert "already_done" not in report
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["listwise"]["window"] == 4
    run_job(into(narrow, tmp_path / "fresh"))
    for name in SAME:
        assert (tmp_path / "fresh" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert part_of(tmp_path / "out").stat() == part
    assert len(names(tmp_path / "out" / "parts")) == 3  # those of the old stage are gone
    run_job(spec, stage="listwise")  # and back
    assert report_of(tmp_path / "out")["listwise"]["window"] == WINDOW
    assert fake.ranker.requests


def test_the_second_stage_again_with_less_depth(fake: Fake, spec: JobSpec, tmp_path: Path) -> None:
    """The parts carry the text of eight, so four will do, and eight again."""
    run_job(spec)
    shallow = other(spec, depth=4, window=4, step=2)
    report = run_job(shallow, stage="listwise")
    assert report["listwise"]["depth"] == 4
    run_job(into(shallow, tmp_path / "fresh"))
    for name in SAME:
        assert (tmp_path / "fresh" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    run_job(spec, stage="listwise")
    assert report_of(tmp_path / "out")["listwise"]["depth"] == DEPTH
    assert fake.ranker.requests


def test_the_parts_carry_no_more_than_their_depth(
    fake: Fake, spec: JobSpec, tmp_path: Path
) -> None:
    run_job(spec)
    before = states(tmp_path / "out")
    with pytest.raises(ConfigurationError, match="first 8 candidates") as caught:
        run_job(other(spec, depth=9), stage="listwise")
    assert caught.value.valid == "a listwise depth of 2 to 8"
    assert without_lock(states(tmp_path / "out")) == without_lock(before)
    assert len(fake.opened) == 1


@pytest.mark.parametrize("fault", ["no folder", "one stage", "no commit", "broken commit"])
def test_the_second_stage_needs_a_first(
    fault: str, fake: Fake, spec: JobSpec, tmp_path: Path
) -> None:
    match fault:
        case "no folder":
            pass
        case "one stage":
            run_job(replace(spec, listwise=None))
        case _:
            run_job(spec, stage="pointwise")
            (commit,) = (tmp_path / "out" / "commits" / "pointwise").iterdir()
            commit.unlink()
            if fault == "broken commit":
                commit.write_text("{")
    with pytest.raises(ConfigurationError, match="no finished stage 1") as caught:
        run_job(spec, stage="listwise")
    assert "--stage pointwise" in caught.value.next_step
    assert fake.opened == []
    if fault != "one stage":
        assert report_of(tmp_path / "out")["exit_code"] == 78


@pytest.mark.parametrize("fault", ["changed", "cut", "missing"])
def test_a_part_that_is_not_as_it_was_written_is_no_first_stage(
    fault: str, fake: Fake, spec: JobSpec, tmp_path: Path
) -> None:
    run_job(spec, stage="pointwise")
    part = part_of(tmp_path / "out")
    raw = bytearray(part.read_bytes())
    raw[100] ^= 1
    match fault:
        case "changed":
            part.write_bytes(raw)
        case "cut":
            part.write_bytes(raw[:-9])
        case "missing":
            part.unlink()
    with pytest.raises(ConfigurationError, match="no finished stage 1"):
        run_job(spec, stage="listwise")
    assert fake.opened == []
    run_job(spec, stage="pointwise")
    run_job(spec, stage="listwise")
    assert names(tmp_path / "out") == PUBLISHED


def test_inputs_that_changed_meanwhile_are_refused(
    fake: Fake, spec: JobSpec, tmp_path: Path, rows: list[Row]
) -> None:
    run_job(spec, stage="pointwise")
    nested(tmp_path / "in.parquet", rows[:4])
    with pytest.raises(ConfigurationError, match="another job") as caught:
        run_job(spec, stage="listwise")
    assert caught.value.where.endswith("plan.json: job.inputs")
    assert fake.opened == []


def test_the_second_stage_may_run_elsewhere(fake: Fake, spec: JobSpec, tmp_path: Path) -> None:
    """On a device of its own, where the inputs are not."""
    run_job(into(spec, tmp_path / "whole"))
    run_job(spec, stage="pointwise")
    (tmp_path / "in.parquet").unlink()
    run_job(replace(spec, execution=ExecutionSpec(device="cpu")), stage="listwise")
    assert [device for *_, device in fake.opened] == ["auto", "cpu"]
    for name in SAME:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("stage", ["pointwise", "listwise"])
def test_a_job_of_one_stage_has_no_stage_to_choose(
    stage: Any, spec: JobSpec, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="one stage"):
        run_job(replace(spec, listwise=None), stage=stage)
    assert not (tmp_path / "out").exists()


# Failures.


@pytest.mark.parametrize("calls", [0, 3])
@pytest.mark.parametrize("stage", ["all", "listwise"])
def test_a_second_stage_that_dies_leaves_the_parts_and_no_run(
    stage: Any, calls: int, fake: Fake, spec: JobSpec, tmp_path: Path
) -> None:
    run_job(into(spec, tmp_path / "whole"))
    fake.ranker.requests.clear()
    fake.ranker.dies = calls
    with pytest.raises(RuntimeError, match="the listwise device is gone"):
        run_job(spec)
    assert names(tmp_path / "out") == WORK
    report = report_of(tmp_path / "out")
    assert (report["status"], report["exit_code"], report["phase"]) == ("failed", 1, "listwise")
    assert report["shards"]["pointwise"] == {"total": 1, "done": 1}
    fake.ranker.dies = float("inf")
    again = run_job(spec, stage=stage)
    assert again["shards"]["pointwise"] == {"done": 1, "kept": 1}
    assert names(tmp_path / "out") == PUBLISHED
    for name in SAME:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_second_stage_goes_on_from_what_is_committed(
    fake: Fake, spec: JobSpec, tmp_path: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "LEAST_QUERIES", 3)
    with small_shards(4000):
        whole = run_job(into(spec, tmp_path / "whole"))
    total = whole["shards"]["listwise"]["done"]
    assert 2 < total < whole["shards"]["pointwise"]["done"]  # groups of several
    asked = len(fake.ranker.requests)
    fake.ranker.requests.clear()
    fake.ranker.dies = asked - 1
    with small_shards(4000), pytest.raises(RuntimeError, match="the listwise device is gone"):
        run_job(spec)
    before = names(tmp_path / "out" / "commits" / "listwise")
    assert 0 < len(before) < total
    fake.ranker.dies = float("inf")
    watch = Recorder()
    report = run_job(spec, watch)
    assert report["shards"]["listwise"] == {"done": total, "kept": len(before)}
    done = [call[1] for call in watch.calls if call[0] == "listwise"]
    assert done[0] > 0
    assert (done, done[-1]) == (sorted(done), len(rows))
    for name in SAME:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_lists_that_kill_keep_their_order(
    fake: Fake, spec: JobSpec, tmp_path: Path, rows: list[Row], first_stage: dict[str, list[str]]
) -> None:
    poison = {"listwise/00000-000000000000": frozenset({0, 4, 7})}
    report = run_job(other(spec, max_failed_windows="100%"), poison=poison)
    asked = {request.window.qid for wave in fake.ranker.requests for request in wave}
    assert asked == {f"q{i}" for i in (1, 2, 3, 5, 6)}
    found, wanted = order(tmp_path / "out"), expected(first_stage, rows)
    for i in range(8):
        qid = f"q{i}"
        assert found[qid] == (first_stage[qid] if i in {0, 4, 7} else wanted[qid])
    assert report["listwise"]["windows"]["failed"] == 3 * WINDOWS
    assert list(report["listwise"]["failed_reasons"].values()) == [3 * WINDOWS]
    assert report["queries"] == counts(8, 8)


def test_a_first_stage_that_dies_leaves_no_commit(
    fake: Fake, spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "ENCODE_LISTS", 1)
    monkeypatch.setattr(blocks, "BLOCK_PAIRS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "open_scorer", lambda *a, **k: Failing(open_scorer(*a, **k), 5))
        with pytest.raises(RuntimeError, match="the device is gone"):
            run_job(spec)
    assert names(tmp_path / "out") | {"parts"} == WORK  # a part may not have been begun yet
    assert "pointwise" not in names(tmp_path / "out" / "commits")
    assert not list(tmp_path.glob("out/parts/*"))
    with pytest.raises(ConfigurationError, match="no finished stage 1"):
        run_job(spec, stage="listwise")
    assert fake.opened == []


def test_another_second_stage_that_dies_leaves_the_old_run(
    fake: Fake, spec: JobSpec, tmp_path: Path
) -> None:
    run_job(spec)
    before = {name: (tmp_path / "out" / name).read_bytes() for name in SAME}
    fake.ranker.dies = len(fake.ranker.requests) + 1
    narrow = other(spec, window=4, step=2)
    with pytest.raises(RuntimeError):
        run_job(narrow, stage="listwise")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in SAME} == before
    assert names(tmp_path / "out") >= END
    fake.ranker.dies = float("inf")
    report = run_job(narrow, stage="listwise")
    assert (report["listwise"]["window"], report["status"]) == (4, "ok")
    assert finished(tmp_path / "out")
    assert (tmp_path / "out" / "run.trec").read_bytes() != before["run.trec"]


def test_another_second_stage_that_dies_leaves_the_old_run_whole(
    fake: Fake, spec: JobSpec, tmp_path: Path
) -> None:
    """What the manifest of the old run names is as it says, until the new one is published."""
    run_job(spec)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    fake.ranker.dies = len(fake.ranker.requests) + 1
    with pytest.raises(RuntimeError):
        run_job(other(spec, window=4, step=2), stage="listwise")
    found = {name: asdict(hash_file(tmp_path / "out" / name)) for name in manifest["files"]}
    assert found == manifest["files"]
    assert finished(tmp_path / "out") == manifest


def test_less_listwise_depth_is_pointed_to_its_own_run(fake: Fake, spec: JobSpec) -> None:
    run_job(spec)
    with pytest.raises(ConfigurationError, match="another job") as caught:
        run_job(other(spec, depth=4, window=4, step=2))
    assert "--stage listwise" in caught.value.next_step
    assert fake.opened


def test_the_first_stage_alone_needs_no_package_of_the_second(
    fake: Fake, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its machine may see the listwise bundle on a shared disk and have no PyTorch."""
    found = listwise.find_spec
    monkeypatch.setattr(
        listwise, "find_spec", lambda name: found(name) if name != "torch" else None
    )
    assert run_job(spec, stage="pointwise")["status"] == "listwise-outstanding"
    assert fake.opened == []


@pytest.mark.parametrize("count", ["queries", "candidates"])
def test_counts_that_do_not_add_up_publish_nothing(
    count: str, fake: Fake, spec: JobSpec, tmp_path: Path
) -> None:
    """A part whose commit says something else: a fault of ours, found before the end."""
    run_job(spec, stage="pointwise")
    (path,) = (tmp_path / "out" / "commits" / "pointwise").iterdir()
    fields = unsealed(json.loads(path.read_text()))
    assert fields
    fields["counts"][count]["written"] += 1
    path.write_text(json.dumps(sealed(fields)))
    with pytest.raises(AssertionError):
        run_job(spec, stage="listwise")
    assert names(tmp_path / "out") == WORK
    assert fake.ranker.requests


@pytest.mark.parametrize(
    ("allowed", "status"),
    [(0, "too-many-failed-windows"), (3, "too-many-failed-windows"), (4, "ok"), ("100%", "ok")],
)
def test_failed_windows_are_counted_and_published(
    allowed: int | str, status: str, fake: Fake, spec: JobSpec, tmp_path: Path
) -> None:
    fake.ranker.fails = lambda r: r.window.qid in {"q0", "q7"}
    report = run_job(other(spec, max_failed_windows=allowed))
    assert report["status"] == status
    assert report["listwise"]["windows"]["failed"] == 4
    assert report_of(tmp_path / "out")["status"] == status
    assert names(tmp_path / "out") == PUBLISHED


def refused(spec: JobSpec, match: str, *, stage: Any = "all") -> DearBatchError:
    """The error of a job that stops before stage 1, and publishes nothing but why."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "open_scorer", None)
        with pytest.raises(DearBatchError, match=match) as caught:
            run_job(spec, stage=stage)
    folder = Path(spec.output.folder)
    assert names(folder) <= WORK - {"parts"}
    assert not (folder / "commits").exists()
    assert report_of(folder)["exit_code"] == caught.value.exit_code
    return caught.value


@pytest.mark.parametrize("stage", ["all", "pointwise"])
def test_a_pointwise_bundle_is_no_listwise_one(
    stage: str, fake: Fake, spec: JobSpec, bundle: Make
) -> None:
    error = refused(
        other(spec, bundle=str(bundle("llama31"))), "pointwise model, given as", stage=stage
    )
    assert (error.exit_code, error.valid) == (78, "a listwise bundle")
    assert fake.checked == []


def test_a_listwise_bundle_is_no_pointwise_one(fake: Fake, spec: JobSpec, generator: Path) -> None:
    swapped = replace(spec, pointwise=replace(spec.pointwise, bundle=str(generator)))
    error = refused(swapped, "listwise model, given as the pointwise one")
    assert error.exit_code == 78
    assert fake.opened == []


def test_a_listwise_bundle_that_changed_is_refused_before_stage_one(
    fake: Fake, spec: JobSpec, tmp_path: Path
) -> None:
    folder = listwise_bundle(tmp_path / "changed")
    (folder / "config.json").write_text('{"model_type": "llamA"}')
    error = refused(other(spec, bundle=str(folder)), "not what its manifest says")
    assert error.exit_code == 77
    assert fake.checked == []


def test_what_the_model_side_refuses_is_refused_before_stage_one(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)

    def refuse(*_: object) -> None:
        raise ConfigurationError("windows too large for the model")

    monkeypatch.setattr("dear_batch.run.listwise.check_listwise", refuse)
    refused(spec, "windows too large")


def test_a_gpu_that_is_not_there_is_reported_before_stage_one(fake: Fake, spec: JobSpec) -> None:
    far = replace(spec, execution=ExecutionSpec(device="cuda:99"))
    error = refused(far, "--device cuda:99")
    assert error.exit_code == 78
    assert fake.checked == []


def test_only_a_job_for_a_gpu_imports_torch_before_stage_one(
    fake: Fake, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert spec.listwise
    monkeypatch.setitem(sys.modules, "dear_batch.listwise.model", None)
    for device in ("auto", "cpu"):
        listwise.prepare(spec.listwise, device)
    assert len(fake.checked) == 2
    with pytest.raises(ImportError):
        listwise.prepare(spec.listwise, "cuda")


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_a_missing_package_is_reported_before_stage_one(
    package: str, fake: Fake, spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = listwise.find_spec
    monkeypatch.setattr(
        listwise, "find_spec", lambda name: found(name) if name != package else None
    )
    error = refused(spec, f"needs the package '{package}'")
    assert error.next_step == "pip install 'dear-batch[listwise]'"
    far = other(spec, bundle=str(tmp_path / "elsewhere"))
    run_job(far, stage="pointwise")  # which needs none of it where the bundle is not either
    assert names(tmp_path / "out") == WORK
    assert fake.opened == []
