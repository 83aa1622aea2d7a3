"""What a bundle, a Parquet file or an output folder holds, as tables for one screen."""

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dear_batch.bundle import MANIFEST, open_bundle
from dear_batch.errors import InputError
from dear_batch.files.pages import open_parquet
from dear_batch.files.parquet import RowReader, open_input
from dear_batch.run.folder import PLAN, REPORT, read_json, read_plan
from dear_batch.run.planning import outline
from dear_batch.run.report import FAILED, STOPPED
from dear_batch.show import listwise_facts, seconds_of

PREVIEW = 3
TEXT = 60


def inspect_path(path: Path) -> RenderableType:
    """The view that fits what the path is.

    Raises:
        InputError: none of the three.
    """
    if (path / MANIFEST).is_file():
        return _bundle(path)
    if (path / PLAN).is_file():
        return _output(path)
    if path.is_file():
        return _parquet(path)
    raise InputError(
        f"{path} is not something that dear-batch wrote or reads.",
        valid="a bundle (bundle.json), an output folder (plan.json) or a .parquet file",
    )


def _facts(title: str, facts: dict[str, Any]) -> Table:
    table = Table(title=Text(title), show_header=False, title_justify="left")
    for name, value in facts.items():
        table.add_row(name, Text(str(value)))
    return table


def _bundle(path: Path) -> RenderableType:
    bundle = open_bundle(path, verify=False)
    manifest = bundle.manifest
    source = manifest.source
    recipe = manifest.recipe
    facts = {
        "task": manifest.task,
        "model": _at(source.model, source.revision),
        "adapter": _at(source.adapter, source.adapter_revision) if source.adapter else "none",
        "architecture": ", ".join(f"{k} {v}" for k, v in manifest.architecture.items()),
        "precision": manifest.precision,
        "recipe": f"{recipe.name}, {recipe.pooling}, {recipe.max_length} tokens" if recipe else "",
        "size": f"{sum(f.bytes for f in manifest.files.values()) / 1e9:.2f} GB, "
        f"{len(manifest.files)} files",
        "created": manifest.created,
        "versions": ", ".join(f"{k} {v}" for k, v in manifest.versions.items()),
        "sha256": bundle.sha256,
    }
    return Group(_facts(f"Bundle {path}", facts), _parity(manifest.parity))


def _at(name: str | None, revision: str | None) -> str:
    return f"{name} @ {revision}" if revision else f"{name} (local folder)"


def _parity(parity: Any) -> RenderableType:
    if parity is None:
        return "No graphs, so no parity figures: a listwise bundle runs in PyTorch."
    table = Table(title=f"Parity with PyTorch fp32, tolerance {parity['tolerance']:g}")
    for column in ("graph", "pairs", "max |Δscore|", "relative", "Kendall τ", "top-10", "ties"):
        table.add_column(column, justify="left" if column == "graph" else "right")
    for name, p in parity["graphs"].items():
        table.add_row(
            name,
            str(p["pairs"]),
            f"{p['max_abs_difference']:.2e}",
            f"{p['relative_difference']:.2e}",
            f"{p['kendall_tau']:.4f}",
            f"{p['top10_overlap']:.4f}",
            str(p["ties"]),
        )
    return table


def _parquet(path: Path) -> RenderableType:
    """Candidate lists with their first rows; any other Parquet file by its schema."""
    with open_parquet(path) as source:
        metadata, schema = source.metadata, source.schema_arrow
    facts = {
        "rows": f"{metadata.num_rows:,} in {metadata.num_row_groups} row groups",
        "size": f"{path.stat().st_size / 1e6:,.1f} MB",
    }
    try:
        file = open_input(path)
    except InputError as error:
        columns = ", ".join(f"{f.name}: {f.type}" for f in schema)
        return _facts(f"Parquet {path}", {**facts, "columns": columns, "runs": f"no. {error.what}"})
    per = "query" if file.layout == "nested" else "candidate"
    scores = "yes" if file.has_score else "no"
    facts |= {"layout": f"{file.layout}, a row a {per}", "first-stage scores": scores}
    preview = Table(title="First lists")
    for column in ("qid", "query", "candidates", "first candidate"):
        preview.add_column(column)
    with RowReader(file) as reader:
        for _, item in zip(range(PREVIEW), reader.read(0, min(file.n_rows, 1000)), strict=False):
            first = item.candidates[0] if item.candidates else None
            shown = f"{first.docid}: {first.title} {first.text}"[:TEXT] if first else ""
            cells = (str(item.qid), str(item.query)[:TEXT], str(len(item.candidates)), shown)
            preview.add_row(*map(Text, cells))
    return Group(_facts(f"Parquet {path}", facts), preview)


def _output(path: Path) -> RenderableType:
    plan = read_plan(path)
    if plan is None:
        raise InputError(f"{path / PLAN} was not written by this version of dear-batch run.")
    facts = {
        "inputs": ", ".join(pin["path"] for pin in plan["job"]["inputs"][:PREVIEW]),
        "queries planned": sum(output["queries"] for output in plan["outputs"]),
        "shards": sum(len(output.shards) for output in outline(plan)),
        "bundle sha256": plan["job"]["bundle_sha256"],
    }
    if plan["listwise"]:
        facts["listwise sha256"] = plan["listwise"]["bundle_sha256"]
    report = read_json(path / REPORT)
    if report is None or report["status"] in {FAILED, STOPPED}:
        status = "not finished" if report is None else f"{report['status']}: {_why(report)}"
        return _facts(f"Output {path}", {**facts, "status": f"{status}; see dear-batch status"})
    for name in ("queries", "candidates"):
        facts[name] = ", ".join(f"{count:,} {what}" for what, count in report[name].items())
    facts |= {
        "status": report["status"],
        "outputs": ", ".join(report["outputs"]) or "none yet, the parts of stage 1",
        "engine": f"{report['engine']} on {report['device']}, {report['precision']}",
        "set aside": _reasons(report["quarantine_reasons"]),
        "skipped": _reasons(report["skipped_reasons"]),
        "truncated pairs": report["truncated_pairs"],
        "tokens": f"{report['tokens']:,} at {report['tokens_per_second'] or 0:,.0f}/s",
        "padding share": f"{report['padding_share']:.2%}",
        "seconds": seconds_of(report["seconds"]),
    }
    if listwise := report.get("listwise"):
        facts |= listwise_facts(listwise)
        facts["listwise seconds"] = seconds_of(listwise["seconds"])
    return _facts(f"Output {path}", facts)


def _why(report: dict[str, Any]) -> str:
    return str((report.get("error") or {}).get("what", ""))


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {why}" for why, n in counts.items()) or "nothing"
