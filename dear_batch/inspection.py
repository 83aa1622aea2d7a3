"""What a bundle, a Parquet file or an output folder holds, as tables for one screen."""

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dear_batch.bundle import MANIFEST, Engine, open_bundle
from dear_batch.errors import InputError
from dear_batch.files.pages import open_parquet
from dear_batch.files.parquet import RowReader, open_input
from dear_batch.run.folder import LOCK, PLAN, REPORT, read_json, read_plan
from dear_batch.run.published import as_written
from dear_batch.run.status import status_of
from dear_batch.show import busy, listwise_facts, passed_over, status_table

PREVIEW = 3
TEXT = 60


def inspect_path(path: Path) -> RenderableType:
    """The view that fits what the path is.

    Raises:
        InputError: none of the three.
    """
    if (path / MANIFEST).is_file():
        return _bundle(path)
    if any((path / name).is_file() for name in (PLAN, LOCK)):
        return _output(path)
    if path.is_file():
        return _parquet(path)
    raise InputError(
        f"{path} is not something that dear-batch wrote or reads.",
        valid=f"a bundle ({MANIFEST}), an output folder ({PLAN}) or a .parquet file",
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
        "engines": "\n".join(map(_engine, manifest.engines)) or "none",
        "size": f"{sum(f.bytes for f in manifest.files.values()) / 1e9:.2f} GB, "
        f"{len(manifest.files)} files",
        "created": manifest.created,
        "versions": ", ".join(f"{k} {v}" for k, v in manifest.versions.items()),
        "sha256": bundle.sha256,
    }
    return Group(_facts(f"Bundle {path}", facts), _parity(manifest.parity))


def _at(name: str | None, revision: str | None) -> str:
    return f"{name} @ {revision}" if revision else f"{name} (local folder)"


def _engine(engine: Engine) -> str:
    limits = f"rows of {engine.row_tokens}, batches of {engine.batch_tokens} tokens"
    return f"{engine}: {limits}, {engine.bytes / 1e9:.2f} GB"


def _parity(parity: Any) -> RenderableType:
    if parity is None:
        return "No graphs, so no parity figures: a listwise bundle runs in PyTorch."
    limits = ", ".join(f"{name} {value:g}" for name, value in parity["gate"].items() if value)
    table = Table(title=f"Parity with PyTorch fp32, gate: {limits}")
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
    """How far a job is, what it was asked for, and what is known of how it went."""
    status = status_of(path)
    plan, report = read_plan(path), read_json(path / REPORT)
    views: list[RenderableType] = [status_table(status.to_json())]
    with as_written(path):
        if plan:
            views.append(_facts("Job", _asked(plan)))
        if report and status.state != "running":  # else it is that of an earlier attempt
            views.append(_facts("Report", _reported(report)))
    return Group(*views)


def _asked(plan: dict[str, Any]) -> dict[str, Any]:
    """The job of a plan, and what computes it here."""
    job, listwise = plan["job"], plan["listwise"]
    facts = {
        "inputs": _some([pin["path"] for pin in job["inputs"]]),
        "rows": f"{sum(pin['rows'] for pin in job['inputs']):,}",
        "runs": _some([f"{output['stem']}.trec" for output in plan["outputs"]]),
        "bundle sha256": job["bundle_sha256"],
        "pointwise": ", ".join(
            f"{name} {'all' if value is None else value}"
            for name, value in job["pointwise"].items()
        ),
    }
    if listwise:
        names = ("depth", "window", "step", "prompt", "reasoning_tokens")
        facts["listwise sha256"] = listwise["bundle_sha256"] or "not known on this machine"
        facts["listwise"] = ", ".join(f"{name} {listwise[name]}" for name in names)
    for stage, runtime in plan["runtime"].items():
        if runtime:
            known = (f"{name} {value}" for name, value in runtime.items() if value is not None)
            facts[f"{stage} runtime"] = ", ".join(known)
    return facts


def _some(names: list[str]) -> str:
    """The first of many."""
    more = len(names) - PREVIEW
    return ", ".join(names[:PREVIEW]) + (f" and {more:,} more" if more > 0 else "")


def _reported(report: dict[str, Any]) -> dict[str, Any]:
    """A report as far as its job got: one that failed early says little beside why."""
    facts = {"status": f"{report['status']}, exit code {report['exit_code']}"}
    if "phase" in report:
        facts["ended in"] = f"the phase {report['phase']}"
    for name, label in (("quarantine_reasons", "set aside"), ("skipped_reasons", "skipped")):
        if name in report:
            reasons = ", ".join(f"{count:,} {why}" for why, count in report[name].items())
            facts[label] = reasons or "nothing"
    if "engine" in report:
        facts |= {
            "outputs": _some(report["outputs"]) or "none yet, the parts of stage 1",
            "engine": f"{report['engine']} on {report['device']}, {report['precision']}",
            "passed over": "\n".join(passed_over(report)) or "nothing better",
            "truncated pairs": f"{report['truncated_pairs']:,}",
            "tokens": f"{report['tokens']:,} at {report['tokens_per_second'] or 0:,.0f}/s",
            "padding share": f"{report['padding_share']:.2%}",
            "engine busy": busy(report) or "not known",
            "out of memory": f"{report['memory_backoffs']:,} batches halved",
            "seconds": _seconds(report["seconds"]),
        }
    if listwise := report.get("listwise"):
        facts |= listwise_facts(listwise)
        facts["listwise seconds"] = _seconds(listwise["seconds"])
    return facts


def _seconds(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value}" for name, value in seconds.items())
