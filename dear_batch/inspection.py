"""What a bundle, a Parquet file or an output folder holds, as tables for one screen."""

import json
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dear_batch.bundle import MANIFEST, open_bundle
from dear_batch.errors import InputError
from dear_batch.files.pages import open_parquet
from dear_batch.files.parquet import RowReader, open_input
from dear_batch.show import listwise_facts

PREVIEW = 3
TEXT = 60


def inspect_path(path: Path) -> RenderableType:
    """The view that fits what the path is.

    Raises:
        InputError: none of the three.
    """
    if (path / MANIFEST).is_file():
        return _bundle(path)
    if (path / "plan.json").is_file():
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


def _seconds(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value}" for name, value in seconds.items())


def _json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error
    return fields if isinstance(fields, dict) else {}


def _output(path: Path) -> RenderableType:
    plan = _json(path / "plan.json")
    if not {"inputs", "outputs", "bundle_sha256"} <= plan.keys():
        raise InputError(f"{path / 'plan.json'} was not written by dear-batch run.")
    facts = {
        "inputs": ", ".join(item["path"] for item in plan["inputs"][:PREVIEW]),
        "queries planned": sum(output["queries"] for output in plan["outputs"]),
        "shards": sum(len(output["shards"]) for output in plan["outputs"]),
        "bundle sha256": plan["bundle_sha256"],
    }
    if "listwise" in plan:
        facts["listwise sha256"] = plan["listwise"]["bundle_sha256"]
    report_path = path / "report.json"
    if not report_path.is_file():
        return _facts(f"Output {path}", {**facts, "status": "not finished: no report.json"})
    report = _json(report_path)
    for name in ("queries", "candidates"):
        facts[name] = ", ".join(f"{count:,} {what}" for what, count in report[name].items())
    facts |= {
        "status": report["status"],
        "outputs": ", ".join(report["outputs"]) or "none yet, the parts of stage 1",
        "engine": f"{report['engine']} on {report['device']}, {report['precision']}",
        "set aside": ", ".join(f"{n:,} {why}" for why, n in report["quarantine_reasons"].items())
        or "nothing",
        "truncated pairs": report["truncated_pairs"],
        "tokens": f"{report['tokens']:,} at {report['tokens_per_second'] or 0:,.0f}/s",
        "padding share": f"{report['padding_share']:.2%}",
        "seconds": _seconds(report["seconds"]),
    }
    if listwise := report.get("listwise"):
        facts |= listwise_facts(listwise)
        facts["listwise seconds"] = _seconds(listwise["seconds"])
    return _facts(f"Output {path}", facts)
