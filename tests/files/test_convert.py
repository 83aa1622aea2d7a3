"""Converters of other projects' formats, on hand-written files and on the real collections."""

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dear_batch.data import Candidate, CandidateList
from dear_batch.errors import InputError, OutputError, UsageError
from dear_batch.files.convert import (
    Converted,
    convert_beir,
    convert_rankgpt,
    convert_tevatron,
)
from dear_batch.files.parquet import RowReader, open_input

REPOSITORY = Path(__file__).parents[2]
COLLECTIONS = Path(os.environ.get("DEAR_BATCH_TEST_DATA", REPOSITORY.parent / "shared" / "data"))


def read_all(path: Path) -> list[CandidateList]:
    file = open_input(path)
    with RowReader(file) as reader:
        return list(reader.read(0, file.n_rows))


def write_lines(path: Path, *records: object) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def collection(name: str) -> Path:
    path = COLLECTIONS / name
    if not path.exists():
        pytest.skip(f"{path} is absent: set DEAR_BATCH_TEST_DATA to the folder of collections")
    return path


Converter = Callable[[list[Path], Path], Converted]


def refused(convert: Converter, paths: list[Path], folder: Path) -> InputError:
    """The error of a conversion, after which nothing is left but what was there."""
    before = sorted(folder.iterdir())
    with pytest.raises(InputError) as caught:
        convert(paths, folder / "out.parquet")
    assert sorted(folder.iterdir()) == before
    return caught.value


# --- RankGPT ---


def hit(docid: object, content: object = "text", qid: object = 3, **more: object) -> dict[str, Any]:
    return {"content": content, "qid": qid, "docid": docid, "rank": 9} | more


def test_rankgpt(tmp_path: Path) -> None:
    items = [
        {"query": "first?", "hits": [hit(7, score=2), hit("x", None, score=None), hit(1, "é")]},
        {"query": "no hits", "hits": []},
        {"query": None, "hits": [hit("d", qid="q")]},
    ]
    (tmp_path / "1.json").write_text(json.dumps(items, indent=1))
    (tmp_path / "2.json").write_text("\ufeff" + json.dumps(items[:1], ensure_ascii=False))
    out = tmp_path / "out.parquet"
    converted = convert_rankgpt([tmp_path / "1.json", tmp_path / "2.json"], out)
    assert converted == Converted(4, 7, 2, 2, out)
    first = (
        Candidate("7", "", "text", 2.0),
        Candidate("x", "", None, None),
        Candidate("1", "", "é", None),
    )
    assert read_all(out) == [
        CandidateList("3", "first?", first, 0),
        CandidateList(None, "no hits", (), 1),
        CandidateList("q", None, (Candidate("d", "", "text", None),), 2),
        CandidateList("3", "first?", first, 3),
    ]


def test_rankgpt_streams_items_across_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [{"query": f"{n} [,]", "hits": [hit(n, 'a"}],' * n)]} for n in range(60)]
    (tmp_path / "in.json").write_text(json.dumps(items, indent=2))
    for size in (1, 7, 1000):
        monkeypatch.setattr("dear_batch.files.json_files._READ_CHARACTERS", size)
        convert_rankgpt([tmp_path / "in.json"], tmp_path / "out.parquet")
        lists = read_all(tmp_path / "out.parquet")
        assert [item.query for item in lists] == [item["query"] for item in items]
        assert [item.candidates[0].text for item in lists] == [
            item["hits"][0]["content"] for item in items
        ]


@pytest.mark.parametrize(
    ("content", "what", "line"),
    [
        ("{}", "the start of an array expected", 1),
        ('[{"query": "a", "hits": []}\n,\n{"query" "b"}]', "Expecting ':' delimiter", 3),
        ('[{"query": "a", "hits": []},\n{"query": "b", "hi', "Malformed or cut JSON", 2),
        ('[{"query": "a", "hits": []}', "a comma or the end of the array expected", 1),
        ('[{"query": "a", "hits": []}]\n\nx', "Text after the end of the array", 3),
        ('[\n"query"]', "Not a JSON object", 2),
        ('[{"hits": []}]', "Missing key 'query'", 1),
        ('[{"query": "a"}]', "A query has no list of hits", 1),
        ('[{"query": "a", "hits": [1]}]', "A query has no list of hits", 1),
        ('[{"query": 5, "hits": []}]', "Key 'query' holds a JSON int", 1),
        ("[]", "There is nothing to convert", None),
        ("", "is empty (0 bytes)", None),
        (" \n", "the start of an array expected", 2),
    ],
)
def test_malformed_rankgpt(tmp_path: Path, content: str, what: str, line: int | None) -> None:
    path = tmp_path / "in.json"
    path.write_text(content)
    error = refused(convert_rankgpt, [path], tmp_path)
    assert what in error.what
    assert str(path) in error.where
    assert line is None or f"line {line}" in error.where


@pytest.mark.parametrize(
    ("hits", "what"),
    [
        ([{"content": "x", "qid": 1}], "Missing key 'docid'"),
        ([hit(1.5)], "Key 'docid' holds a JSON float"),
        ([hit(True)], "Key 'docid' holds a JSON bool"),
        ([hit(1, ["x"])], "Key 'content' holds a JSON list"),
        ([hit(1, score="2.5")], "Key 'score' holds a JSON str"),
        ([hit(1), hit(2, qid=4)], "several qids: ['3', '4']"),
    ],
)
def test_malformed_hits(tmp_path: Path, hits: list[dict[str, Any]], what: str) -> None:
    (tmp_path / "in.json").write_text(json.dumps([{"query": "a", "hits": hits}]))
    assert what in refused(convert_rankgpt, [tmp_path / "in.json"], tmp_path).what


def test_rankgpt_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_bytes(b'[{"query": "caf\xe9", "hits": []}]')
    assert "Not UTF-8" in refused(convert_rankgpt, [tmp_path / "in.json"], tmp_path).what


def test_half_an_emoji_becomes_a_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps([{"query": "cut \ud83d", "hits": []}]))
    convert_rankgpt([tmp_path / "in.json"], tmp_path / "out.parquet")
    assert read_all(tmp_path / "out.parquet")[0].query == "cut \ufffd"


# --- Tevatron ---


def line(qid: object, docid: object, **more: object) -> dict[str, Any]:
    record = {"query_id": qid, "query": f"query {qid}", "docid": docid, "title": "T", "text": "x"}
    return record | more


def test_tevatron_brings_scattered_lines_together(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "1.jsonl", line(2, "a", score=1), "", line("1", 5), line(2, 4))
    second = tmp_path / "2.jsonl.gz"
    records = [line("2", "z", title=None, text=None), {**line(1, "y", extra=1)}]
    del records[1]["title"]
    second.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    out = tmp_path / "out.parquet"
    assert convert_tevatron([first, second], out) == Converted(2, 5, 0, 1, out)
    of_2 = (
        Candidate("a", "T", "x", 1.0),
        Candidate("4", "T", "x", None),
        Candidate("z", "", None, None),
    )
    of_1 = (Candidate("5", "T", "x", None), Candidate("y", "", "x", None))
    assert read_all(out) == [
        CandidateList("2", "query 2", of_2, 0),
        CandidateList("1", "query 1", of_1, 1),
    ]


def test_tevatron_lines_without_query_id(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "1.jsonl", line(None, "a"), line("1", "b"), line("1", "c"))
    out = tmp_path / "out.parquet"
    assert convert_tevatron([path], out) == Converted(2, 3, 1, 0, out)
    assert [item.qid for item in read_all(out)] == [None, "1"]


def test_tevatron_of_many_batches(tmp_path: Path) -> None:
    chooser = random.Random(4)
    qids = [chooser.randrange(300) for _ in range(10_000)]
    path = write_lines(tmp_path / "1.jsonl", *(line(q, d) for d, q in enumerate(qids)))
    convert_tevatron([path], tmp_path / "out.parquet")
    expected: dict[str, list[str]] = {}
    for docid, qid in enumerate(qids):
        expected.setdefault(str(qid), []).append(str(docid))
    lists = read_all(tmp_path / "out.parquet")
    assert [(x.qid, [c.docid for c in x.candidates]) for x in lists] == list(expected.items())


@pytest.mark.parametrize(
    ("records", "what", "where"),
    [
        ([line(1, 2), '{"query_id": 1,'], "Malformed JSON", "line 2"),
        ([line(1, 2), "", "[1]"], "Not a JSON object", "line 3"),
        ([line(1, 2), {"qid": 1}], "Missing key 'query_id'", "line 2, which has: qid"),
        ([line([], 2)], "Key 'query_id' holds a JSON list", "line 1"),
        ([line(1, 2, score="x")], "Key 'score' holds a JSON str", "line 1"),
        (["", " "], "There is nothing to convert", "in.jsonl"),
    ],
)
def test_malformed_tevatron(tmp_path: Path, records: list[object], what: str, where: str) -> None:
    path = write_lines(tmp_path / "in.jsonl", *records)
    error = refused(convert_tevatron, [path], tmp_path)
    assert what in error.what
    assert str(path) in error.where
    assert where in error.where


def test_cut_gzip(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    records = (json.dumps(line(n, os.urandom(20).hex())) for n in range(1000))
    path.write_bytes(gzip.compress("\n".join(records).encode())[:-2000])
    error = refused(convert_tevatron, [path], tmp_path)
    assert error.what.startswith("Cannot read in.jsonl.gz: Compressed file ended")
    path.write_bytes(b"no gzip")
    assert "Not a gzipped file" in refused(convert_tevatron, [path], tmp_path).what


def test_missing_input_and_output_folder(tmp_path: Path) -> None:
    absent = tmp_path / "none.jsonl"
    assert "No such file" in refused(convert_tevatron, [absent], tmp_path).what
    assert "Is a directory" in refused(convert_rankgpt, [tmp_path], tmp_path).what
    path = write_lines(tmp_path / "in.jsonl", line(1, 2))
    with pytest.raises(OutputError):
        convert_tevatron([path], tmp_path / "none" / "out.parquet")


# --- BEIR ---

RUN = (
    "q2 Q0 d3 1 9.5 tag",
    "q2\tQ0\td1\t2\t9.75\ttag",
    "q1 Q0 d1 3 1e1 tag",
    "q1 Q0 d2 2 1e1 tag",
    "q1  Q0  d3  1  -1  tag",
    "q2 Q0 gone 3 0.5 tag",
    "",
    "q9 Q0 d2 1 1 tag",
)
BEIR_LISTS = [
    CandidateList(
        "q2",
        "two",
        (
            Candidate("d1", "A", "first", 9.75),
            Candidate("d3", "", "third", 9.5),
            Candidate("gone", "", None, 0.5),
        ),
        0,
    ),
    CandidateList(
        "q1",
        "one",
        (
            Candidate("d2", "", None, 10.0),
            Candidate("d1", "A", "first", 10.0),
            Candidate("d3", "", "third", -1.0),
        ),
        1,
    ),
    CandidateList("q9", None, (Candidate("d2", "", None, 1.0),), 2),
]


@pytest.fixture
def beir(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "beir"
    folder.mkdir()
    queries = [{"_id": "q1", "text": "one", "metadata": {}}, {"_id": "q2", "text": "two"}]
    write_lines(folder / "queries.jsonl", *queries, {"_id": "q1", "text": "a repeat"})
    documents = [
        {"_id": "d3", "title": "", "text": "third"},
        {"_id": "d1", "title": "A", "text": "first"},
        {"_id": "d1", "title": "B", "text": "a repeat"},
        {"_id": "d2", "text": None},
        {"_id": "unused", "text": "unused"},
    ]
    write_lines(folder / "corpus.jsonl", *documents)
    return [folder, write_lines(tmp_path / "run.txt", *RUN)]


def test_beir_folder(tmp_path: Path, beir: list[Path]) -> None:
    out = tmp_path / "out.parquet"
    assert convert_beir(beir, out) == Converted(3, 7, 1, 3, out)
    assert read_all(out) == BEIR_LISTS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beir", "out.parquet", "run.txt"]


def test_beir_from_three_files(tmp_path: Path, beir: list[Path]) -> None:
    folder, run = beir
    corpus = tmp_path / "corpus.jsonl.gz"
    corpus.write_bytes(gzip.compress((folder / "corpus.jsonl").read_bytes()))
    convert_beir([folder / "queries.jsonl", corpus, run], tmp_path / "out.parquet")
    assert read_all(tmp_path / "out.parquet") == BEIR_LISTS


@pytest.mark.parametrize("keys", [("_id", "text", "_id"), ("qid", "query", "docid")])
def test_beir_from_parquet(tmp_path: Path, beir: list[Path], keys: tuple[str, str, str]) -> None:
    qid, query, docid = keys
    queries = {qid: ["q2", "q1"], query: pa.array(["two", "one"], pa.large_string())}
    pq.write_table(pa.table(queries), tmp_path / "queries.parquet")
    corpus = {
        docid: ["d1", "d2", "d3"],
        "title": ["A", None, None],
        "text": ["first", None, "third"],
    }
    pq.write_table(pa.table(corpus), tmp_path / "corpus.parquet", row_group_size=1)
    paths = [tmp_path / "queries.parquet", tmp_path / "corpus.parquet", beir[1]]
    convert_beir(paths, tmp_path / "out.parquet")
    assert read_all(tmp_path / "out.parquet") == BEIR_LISTS
    # Integer ids in Parquet meet the same ids as text in the run; there is no title.
    pq.write_table(pa.table({docid: [1, 2], "text": ["x", "y"]}), paths[1])
    write_lines(beir[1], "q1 Q0 2 1 1 t")
    assert convert_beir(paths, tmp_path / "out.parquet").missing_documents == 0
    assert read_all(tmp_path / "out.parquet")[0].candidates == (Candidate("2", "", "y", 1.0),)


def test_beir_run_of_many_batches(tmp_path: Path) -> None:
    chooser = random.Random(6)
    write_lines(tmp_path / "queries.jsonl", *({"_id": n, "text": f"query {n}"} for n in range(90)))
    documents = ({"_id": n, "title": f"{n}", "text": f"text {n}"} for n in range(0, 6000, 2))
    write_lines(tmp_path / "corpus.jsonl", *documents)
    entries = [(chooser.randrange(90), d, chooser.random()) for d in range(6000) for _ in "ab"]
    chooser.shuffle(entries)
    run = write_lines(tmp_path / "run", *(f"{q} Q0 {d} 1 {s} t" for q, d, s in entries))
    converted = convert_beir([tmp_path, run], tmp_path / "out.parquet")
    assert (converted.candidates, converted.missing_documents) == (12_000, 6000)
    expected: dict[int, list[tuple[float, int]]] = {}
    for qid, docid, score in entries:
        expected.setdefault(qid, []).append((-score, docid))
    lists = read_all(tmp_path / "out.parquet")
    assert [item.qid for item in lists] == [str(qid) for qid in expected]
    for item, members in zip(lists, expected.values(), strict=True):
        assert item.query == f"query {item.qid}"
        assert [int(c.docid) for c in item.candidates] == [docid for _, docid in sorted(members)]
        for candidate in item.candidates:
            known = int(candidate.docid) % 2 == 0
            assert candidate.title == (candidate.docid if known else "")
            assert candidate.text == (f"text {candidate.docid}" if known else None)


@pytest.mark.parametrize(
    "malformed",
    [
        "q1 Q0 d1 1 2.5",
        "q1 Q0 d1 1 2.5 my tag",
        "q1 Q0 d1 one 2.5 tag",
        "q1 Q0 d1 1 high tag",
        "q1 Q0 d1 1 nan tag",
        "q1 Q0 d1 1 inf tag",
    ],
)
def test_malformed_run(tmp_path: Path, beir: list[Path], malformed: str) -> None:
    write_lines(beir[1], "q1 Q0 d1 1 2.5 tag", malformed)
    error = refused(convert_beir, beir, tmp_path)
    assert error.where == f"{beir[1]}, line 2"
    assert malformed in error.what
    assert "six fields" in error.valid


def test_malformed_beir(tmp_path: Path, beir: list[Path]) -> None:
    folder, run = beir
    write_lines(folder / "corpus.jsonl", {"_id": "d1", "text": "x"}, {"_id": "d2", "body": "x"})
    error = refused(convert_beir, beir, tmp_path)
    assert error.what == "Missing key 'text'."
    assert error.where == f"{folder / 'corpus.jsonl'}, line 2, which has: _id, body"
    pq.write_table(pa.table({"id": ["d1"], "text": ["x"]}), tmp_path / "c.parquet")
    paths = [folder / "queries.jsonl", tmp_path / "c.parquet", run]
    error = refused(convert_beir, paths, tmp_path)
    assert error.what.startswith("Missing column: _id/docid")
    pq.write_table(pa.table({"_id": ["d1"], "text": [7]}), tmp_path / "c.parquet")
    assert "'text' has type int64" in refused(convert_beir, paths, tmp_path).what
    write_lines(run, "")
    pq.write_table(pa.table({"_id": ["d1"], "text": ["x"]}), tmp_path / "c.parquet")
    assert "nothing to convert" in refused(convert_beir, paths, tmp_path).what
    (folder / "queries.jsonl").unlink()
    assert "queries.jsonl" in refused(convert_beir, beir, tmp_path).where


def test_other_paths_for_beir(tmp_path: Path, beir: list[Path]) -> None:
    for paths in (beir[:1], beir[1:], [beir[1], beir[1]], beir * 2):
        with pytest.raises(UsageError, match="FOLDER RUN, or QUERIES CORPUS RUN"):
            convert_beir(paths, tmp_path / "out.parquet")


# --- the real collections ---


@pytest.mark.parametrize(
    ("name", "queries", "depth"),
    [("dl19/bm25-top100.rankgpt.json", 43, 100), ("noveleval/google-top20.rankgpt.json", 21, 20)],
)
def test_real_rankgpt(tmp_path: Path, name: str, queries: int, depth: int) -> None:
    source, out = collection(name), tmp_path / "out.parquet"
    assert convert_rankgpt([source], out) == Converted(queries, queries * depth, 0, 0, out)
    lists = read_all(out)
    items = json.loads(source.read_text())
    assert [item.query for item in lists] == [item["query"] for item in items]
    for item, original in zip(lists, items, strict=True):
        hits = [
            (hit["qid"], hit["docid"], hit["content"], hit["score"]) for hit in original["hits"]
        ]
        read = [(item.qid, c.docid, c.text, c.first_score) for c in item.candidates]
        assert read == hits


def test_real_beir(tmp_path: Path) -> None:
    folder = collection("qa")
    topics = [row.split("\t") for row in (folder / "qrels/test.tsv").read_text().splitlines()[1:]]
    run = write_lines(tmp_path / "run", *(f"{q} Q0 {d} 1 1.0 t" for q, d, _ in topics))
    converted = convert_beir([folder, run], tmp_path / "out.parquet")
    assert (converted.candidates, converted.missing_queries) == (len(topics), 0)
    assert converted.missing_documents == 0
    documents = map(json.loads, (folder / "corpus.jsonl").read_text().splitlines())
    texts = {document["_id"]: document["text"] for document in documents}
    for item in read_all(tmp_path / "out.parquet"):
        assert [c.text for c in item.candidates] == [texts[c.docid] for c in item.candidates]
