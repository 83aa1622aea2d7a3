"""The main job, end to end: first stage → convert → export → run → evaluate.

Uses a real language model of 135M parameters, a LoRA reranking adapter, and the small
collection beside this file. Everything it makes goes to `.demo/`; run it again and it
rewrites all but the model and the bundle.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import bm25s
from rich.console import Console
from rich.table import Table

from dear_batch.bundle import open_bundle
from dear_batch.errors import DearBatchError

HERE = Path(__file__).parent
ROOT = HERE.parent
COLLECTION = HERE / "collection"
ADAPTER = HERE / "smollm2-pointwise-lora"
WORK = ROOT / ".demo"
DEPTH = 20

console = Console(width=100, highlight=False)


def main() -> None:
    """Run every step, telling what it does."""
    os.chdir(ROOT)
    WORK.mkdir(exist_ok=True)
    start = time.perf_counter()
    base, bundle = WORK / "base", WORK / "bundle"
    if not (base / "config.json").exists():
        step("A real base model, out of a Python package (no hub)")
        run_python(HERE / "base_model.py", base)
    step("First stage: BM25 over 87 passages")
    first_stage(WORK / "first-stage.trec")
    step("Candidate lists as Parquet")
    candidates = WORK / "candidates.parquet"
    dear_batch("convert", "beir", COLLECTION, WORK / "first-stage.trec", "-o", candidates)
    if not is_current(bundle):
        shutil.rmtree(bundle, ignore_errors=True)
        step("Export: merge the adapter, write ONNX, prove parity with PyTorch")
        dear_batch("export", "--model", base, "--adapter", ADAPTER, "--output", bundle)
    step("Rerank")
    shutil.rmtree(WORK / "run", ignore_errors=True)
    dear_batch("run", "--input", candidates, "--bundle", bundle, "--output", WORK / "run")
    step("Evaluate against the judgements, beside the first stage")
    first, ours, qrels = WORK / "first-stage.trec", WORK / "run/run.trec", "qrels/test.tsv"
    figures = WORK / "evaluation.json"
    dear_batch("evaluate", COLLECTION / qrels, ours, "--baseline", first, "--json", figures)
    show_query(first, ours, largest_gain(figures))
    epilogue(time.perf_counter() - start)


def is_current(bundle: Path) -> bool:
    """Whether the bundle is there, as this version of dear-batch writes it."""
    try:
        return bool(open_bundle(bundle, verify=False))
    except DearBatchError:
        return False


def step(text: str) -> None:
    """Head a part of the output."""
    console.print(f"\n[bold]{text}[/bold]")


def run_python(script: Path, *arguments: Path) -> None:
    """Run a script of this folder with this interpreter."""
    quiet = {} if sys.stderr.isatty() else {"TQDM_DISABLE": "1"}
    subprocess.run([sys.executable, script, *arguments], check=True, env=os.environ | quiet)


def dear_batch(*arguments: object) -> None:
    """Run the command as a user would, and show it."""
    words = [str(a.relative_to(ROOT)) if isinstance(a, Path) else str(a) for a in arguments]
    console.print(f"$ dear-batch {shlex.join(words)}", style="cyan", soft_wrap=True)
    command = [sys.executable, "-m", "dear_batch", *words]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    # The last line is JSON for programs.
    shown = [line for line in output.splitlines() if line.strip() and not line.startswith("{")]
    print("\n".join(shown) + "\n" * bool(shown), end="", flush=True)


def read_jsonl(path: Path) -> list[dict]:
    """All records of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def first_stage(path: Path) -> None:
    """BM25 (bm25s, Lucene's variant) top 20; documents that share no word are left out."""
    corpus, queries = (read_jsonl(COLLECTION / f"{n}.jsonl") for n in ("corpus", "queries"))
    texts = [f"{document['title']} {document['text']}" for document in corpus]
    index = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    tokens = bm25s.tokenize([q["text"] for q in queries], stopwords="en", show_progress=False)
    found, scores = index.retrieve(tokens, k=DEPTH, show_progress=False)
    with path.open("w", encoding="utf-8") as file:
        for query, row, values in zip(queries, found, scores, strict=True):
            for rank, (document, score) in enumerate(zip(row, values, strict=True), start=1):
                if score > 0:
                    docid = corpus[document]["_id"]
                    file.write(f"{query['_id']} Q0 {docid} {rank} {score:.6f} bm25s\n")


def largest_gain(figures: Path) -> str:
    """The query whose nDCG@10 rose most."""
    before, after = (e["per_topic"] for e in json.loads(figures.read_text()))
    return max(after, key=lambda qid: after[qid]["nDCG@10"] - before[qid]["nDCG@10"])


def show_query(first: Path, ours: Path, qid: str) -> None:
    """One query's top five before and after, with the judges' grades."""
    queries = {q["_id"]: q["text"] for q in read_jsonl(COLLECTION / "queries.jsonl")}
    texts = {d["_id"]: d["title"] or d["text"] for d in read_jsonl(COLLECTION / "corpus.jsonl")}
    lines = (COLLECTION / "qrels/test.tsv").read_text().splitlines()[1:]
    grades = {tuple(line.split("\t")[:2]): line.split("\t")[2] for line in lines}

    def top(path: Path) -> list[str]:
        rows = [line.split() for line in path.read_text().splitlines()]
        return [row[2] for row in rows if row[0] == qid][:5]

    table = Table(
        title=f'The largest gain of all {len(queries)} queries: "{queries[qid]}"',
        title_justify="left",
    )
    for column in ("rank", "BM25", "grade", "reranked", "grade"):
        table.add_column(column)
    for rank, (before, after) in enumerate(zip(top(first), top(ours), strict=True), start=1):
        cells = [
            cell
            for docid in (before, after)
            for cell in (f"{docid} {texts[docid]}"[:34], grades.get((qid, docid), "-"))
        ]
        table.add_row(str(rank), *cells)
    console.print(table)


def epilogue(seconds: float) -> None:
    """What it took, what was not used, and where to look."""
    report = json.loads((WORK / "run/report.json").read_text())
    console.print(
        f"Done in {seconds:.0f} s: {report['candidates']['written']} pairs, "
        f"{report['tokens_per_second']:,.0f} tokens/s on {report['engine']} ({report['device']})."
    )
    if report["device"] == "cpu":
        console.print(
            "Not used: a GPU (none was found; on Linux x86-64 the installed ONNX Runtime takes "
            "one\nwhere the NVIDIA driver and CUDA are there: --device cuda) and TensorRT "
            "(not built yet)."
        )
    console.print(
        "Look around: dear-batch inspect .demo/bundle, .demo/candidates.parquet, .demo/run"
    )


if __name__ == "__main__":
    main()
