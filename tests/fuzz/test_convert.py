"""Random files of other projects: converted to what a job can read, or refused."""

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import strategies as st

from dear_batch.errors import InputError
from dear_batch.files.convert import convert_beir, convert_rankgpt, convert_tevatron
from dear_batch.files.parquet import RowReader, open_input
from tests.fuzz.effort import Effort
from tests.fuzz.strategies import MEGABYTE, Damage, damages, ids, json_values, raw, texts

FORMS = ("rankgpt", "tevatron", "beir")


@dataclass(frozen=True)
class Files:
    """What is converted."""

    form: str
    contents: tuple[bytes, ...]
    spaces: int = 0  # after all of the last file


def _values() -> st.SearchStrategy[Any]:
    return st.one_of(*[texts()] * 60, st.none(), json_values(), st.just("\ud83d half"))


def _fields(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(fields, optional={"extra": json_values()})


def _identifiers() -> st.SearchStrategy[Any]:
    return st.one_of(*[ids()] * 40, st.integers(0, 9), st.none(), json_values())


def _hits() -> st.SearchStrategy[Any]:
    scores = st.one_of(st.floats(-9, 9), st.integers(-(10**400), 10**400), st.none())
    return st.lists(
        _fields(qid=st.just(1), docid=_identifiers(), content=_values(), score=scores), max_size=4
    )


def _lists() -> st.SearchStrategy[list[Any]]:
    return st.lists(
        _fields(query=_values(), hits=st.one_of(*[_hits()] * 40, _values())), max_size=5
    )


@st.composite
def _files(draw: st.DrawFn) -> Files:
    form = draw(st.sampled_from(FORMS))
    if form == "rankgpt":
        found = (json.dumps(draw(_lists()), indent=draw(st.sampled_from([None, 1]))).encode(),)
    elif form == "tevatron":
        line = _fields(
            query_id=_identifiers(), query=_values(), docid=_identifiers(), text=_values()
        )
        found = (_jsonl(draw(st.lists(line, max_size=8))),)
    else:
        query = _fields(_id=_identifiers(), text=_values())
        document = _fields(_id=_identifiers(), title=_values(), text=_values())
        score = st.sampled_from(["1", "0.5", "-3e9"] * 12 + ["nan", "1e400", "x"])
        one_of = st.sampled_from(["1", "2", "-5"] * 12 + [str(2**70), "x"])
        good = ids().filter(lambda text: len(raw(text).split()) == 1)
        rows = st.lists(
            st.tuples(good, st.just("Q0"), good, one_of, score, st.just("t")), max_size=8
        )
        found = (
            _jsonl(draw(st.lists(query, max_size=4))),
            _jsonl(draw(st.lists(document, max_size=6))),
            raw("".join(" ".join(row) + "\n" for row in draw(rows))),
        )
    if draw(st.integers(0, 9)) == 9:
        damage: Damage = draw(damages("flip", "cut", "insert", "empty", "nested"))
        found = (*found[:-1], damage(found[-1]))
    return Files(form, found, MEGABYTE if draw(st.integers(0, 60)) == 60 else 0)


def _jsonl(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


KNOWN: tuple[Files, ...] = ()


def test_foreign_files_are_converted_or_refused(effort: Effort, tmp_path: Path) -> None:
    def check(files: Files) -> None:
        with TemporaryDirectory(dir=tmp_path) as name:
            folder = Path(name)
            ends = {"rankgpt": "json", "tevatron": "jsonl", "beir": "jsonl"}
            paths = [folder / f"in{i}.{ends[files.form]}" for i in range(len(files.contents))]
            for path, content in zip(paths, files.contents, strict=True):
                path.write_bytes(content)
            with paths[-1].open("ab") as file:
                file.write(b" " * files.spaces)
            convert = {
                "rankgpt": convert_rankgpt,
                "tevatron": convert_tevatron,
                "beir": convert_beir,
            }
            out = folder / "out.parquet"
            try:
                converted = convert[files.form](paths, out)
            except InputError:
                assert not out.exists()
                return
            _check(files, out, converted)

    effort.run(check, _files(), known=KNOWN, few=60, share=0.08)


def _check(files: Files, out: Path, converted: Any) -> None:
    """What a job reads of it is as many as were said, and those of the files."""
    file = open_input(out)
    with RowReader(file) as reader:
        lists = list(reader.read(0, file.n_rows))
    candidates = [(item.qid, c.docid) for item in lists for c in item.candidates]
    assert (len(lists), len(candidates)) == (converted.queries, converted.candidates)
    assert sum(c.text is None for i in lists for c in i.candidates) == converted.missing_documents
    if files.form == "rankgpt":
        given = json.loads(files.contents[0])
        assert [len(item["hits"]) for item in given] == [len(item.candidates) for item in lists]
        assert [c.text for i in lists for c in i.candidates] == [
            _text(hit["content"]) for item in given for hit in item["hits"]
        ]
    elif files.form == "tevatron":
        given = [json.loads(line) for line in files.contents[0].splitlines() if line.strip()]
        wanted = [(_text(g["query_id"]), _text(g["docid"]) or "", _text(g["text"])) for g in given]
        found = [(i.qid, c.docid, c.text) for i in lists for c in i.candidates]
        assert sorted(map(str, found)) == sorted(map(str, wanted))
    else:
        lines = [line.split() for line in files.contents[2].split(b"\n") if line.strip()]
        assert sorted(map(str, candidates)) == sorted(
            str((line[0].decode(), line[2].decode())) for line in lines
        )


def _text(value: Any) -> str | None:
    """A JSON value as text that UTF-8 can hold."""
    if value is None:
        return None
    return str(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
