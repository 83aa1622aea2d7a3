"""Whose output folder it is: `plan.json` says what job writes there, and no other one does.

A two-stage job may get another listwise stage over the same parts, and nothing else anew.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dear_batch import __version__
from dear_batch.bundle import hash_file
from dear_batch.errors import ConfigurationError, InputError, OutputError
from dear_batch.files.durable import replacing, writing
from dear_batch.run.plan import Plan, expand, is_there
from dear_batch.specs import JobSpec, ListwiseSpec

SCHEMA_VERSION = 1
_STATE = ("path", "bytes", "mtime_ns")
Fields = dict[str, Any]


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not ours before any work is done.

    Raises:
        OutputError: a file, or a folder with contents and no `plan.json`.
    """
    try:
        is_other = folder.is_symlink() or folder.exists()
    except OSError as error:  # a name that is too long
        raise OutputError(f"The output {folder} cannot be made: {error.strerror}.") from error
    if is_other and not folder.is_dir():
        raise OutputError(f"The output {folder} is not a folder.", valid="a new or empty folder")
    above = next(p for p in folder.absolute().parents if p.exists())
    if not above.is_dir():
        raise OutputError(f"The output {folder} cannot be made: {above} is not a folder.")
    if folder.is_dir() and not (folder / "plan.json").is_file() and any(folder.iterdir()):
        raise OutputError(
            f"The output folder {folder} is not empty and not ours: it has no plan.json.",
            where=", ".join(sorted(p.name for p in folder.iterdir())[:5]),
            valid="a new or empty folder, or one of an earlier run of this job",
            next_step="choose another --output",
        )


def claim_folder(
    folder: Path,
    plan: Plan,
    spec: JobSpec,
    bundle_sha256: str,
    listwise: Fields | None = None,
    *,
    may_differ: bool = False,
) -> None:
    """Make the output folder ours by writing `plan.json`, or see that it is ours already.

    With `may_differ` (`--stage pointwise`) the folder may be planned with another listwise
    stage, which stays in its plan.

    Raises:
        OutputError: it holds something else, or cannot be written.
        ConfigurationError: it holds another job's output.
    """
    path = folder / "plan.json"
    wanted = _described(plan, spec, bundle_sha256) | ({"listwise": listwise} if listwise else {})
    if path.is_file():
        found = _read_plan(path)
        if may_differ and found and "listwise" in found:
            wanted["listwise"] = found["listwise"]
        _refuse_others(folder, found, wanted)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"Cannot make the output folder {folder}: {error.strerror}.",
            valid="a folder that can be written to",
            next_step="choose another --output",
        ) from error
    _write_plan(folder, wanted)


def plan_listwise(folder: Path, spec: JobSpec, listwise: Fields, *, may_differ: bool) -> Fields:
    """See that stage 1 of this job filled the folder; returns its plan with this `listwise`.

    Args:
        folder: the output folder.
        spec: the job; its inputs are looked at, not read.
        listwise: what `listwise_settings` says of its second stage.
        may_differ: `--stage listwise`, on a machine or device of its own: the inputs may be
            gone. Otherwise other settings are another job.

    Raises:
        ConfigurationError: no stage 1 is there, or that of another job.
    """
    found = _read_plan(folder / "plan.json")
    if found is None or "listwise" not in found:
        raise no_stage_one(folder)
    inputs = _inputs(spec, found["inputs"], may_be_gone=may_differ)
    wanted = {**found, **_tool(spec), "inputs": inputs, "listwise": listwise}
    if may_differ:
        wanted["listwise"] = found["listwise"]
        wanted["spec"]["execution"] = found["spec"]["execution"]
        wanted["spec"]["output"]["folder"] = found["spec"]["output"]["folder"]
    _refuse_others(folder, found, wanted)
    return {**found, "listwise": listwise}


def replan(folder: Path, plan: Fields) -> None:
    """Write a plan whose runs have just been published over those of another listwise stage."""
    if _read_plan(folder / "plan.json") != plan:
        _write_plan(folder, plan)


def retract_report(folder: Path) -> None:
    """Remove the report before anything that it tells of is replaced."""
    path = folder / "report.json"
    with writing(path):
        path.unlink(missing_ok=True)


def listwise_settings(spec: ListwiseSpec, bundle_sha256: str | None) -> Fields:
    """What decides the order that a listwise stage gives; how much may fail does not.

    The bundle has no hash where stage 1 runs alone on a machine that lacks it.
    """
    settings = asdict(spec)
    del settings["max_failed_windows"]
    settings["step"] = spec.stride
    own = spec.prompt.endswith(".toml") and Path(spec.prompt).is_file()
    sha256 = hash_file(Path(spec.prompt)).sha256 if own else None
    return {**settings, "bundle_sha256": bundle_sha256, "prompt_file_sha256": sha256}


def no_stage_one(folder: Path) -> ConfigurationError:
    """The error for a second stage without a first."""
    return ConfigurationError(
        f"There is no finished stage 1 for a listwise stage in {folder}.",
        valid="a folder in which this job ran with --stage pointwise, or without --stage",
        next_step="the same command with --stage pointwise; a folder without [listwise] in its "
        "plan needs another --output",
    )


def _refuse_others(folder: Path, found: Fields | None, wanted: Fields) -> None:
    """Refuse a plan that is not the wanted one, and say in what they differ."""
    wanted = json.loads(json.dumps(wanted))
    if found == wanted:
        return
    found = found or {}
    both = {**found, **wanted}
    differing = [name for name in both if found.get(name) != wanted.get(name)]
    again = differing == ["listwise"] and "listwise" in found and "listwise" in wanted
    other = f"choose another --output, or remove {folder}"
    raise ConfigurationError(
        f"The output folder {folder} belongs to another job: its inputs, bundle or "
        "settings differ.",
        where=f"{folder / 'plan.json'}: {', '.join(differing)}",
        valid="a new folder for each job and night",
        next_step=f"--stage listwise, for another listwise stage over the same parts; or {other}"
        if again
        else other,
    )


def _write_plan(folder: Path, fields: Fields) -> None:
    with replacing(folder / "plan.json") as temporary:
        temporary.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _read_plan(path: Path) -> Fields | None:
    """The plan of a folder, None where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, FileNotFoundError):
        return None
    return (
        content if isinstance(content, dict) and content.keys() >= {"inputs", "outputs"} else None
    )


def _described(plan: Plan, spec: JobSpec, bundle_sha256: str) -> Fields:
    """Everything that decides the output of stage 1; equal plans give equal run files."""
    inputs = [
        {**_state(file.path), "rows": file.n_rows, "layout": file.layout} for file in plan.inputs
    ]
    outputs = [
        {
            "stem": output.stem,
            "queries": output.n_queries,
            "regrouped": any(source.regrouped for source in output.sources),
            "shards": [shard.key for shards in output.shards for shard in shards],
        }
        for output in plan.outputs
    ]
    return {**_tool(spec), "bundle_sha256": bundle_sha256, "inputs": inputs, "outputs": outputs}


def _tool(spec: JobSpec) -> Fields:
    settings = asdict(spec)
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": f"dear-batch {__version__}",
        "spec": {k: settings[k] for k in ("pointwise", "output", "execution")},
    }


def _inputs(spec: JobSpec, planned: list[Fields], *, may_be_gone: bool) -> list[Fields]:
    """The planned inputs where the job has the same and they are unchanged, else the job's."""
    left = [item for item in planned if not may_be_gone or is_there(item["path"])]
    was = [{name: item.get(name) for name in _STATE} for item in left]
    now = [_state(path) for path in expand(spec.input.paths, may_be_gone=may_be_gone)]
    return planned if was == now else now


def _state(path: str) -> Fields:
    try:
        found = Path(path).stat()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.", where=path) from error
    return dict(zip(_STATE, (path, found.st_size, found.st_mtime_ns), strict=True))
