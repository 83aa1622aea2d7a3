"""Commands around output folders: how far a job is, whether its outputs are whole, what may go."""

import sys
from dataclasses import asdict
from pathlib import Path

import click

from dear_batch.errors import DearBatchError, TryAgainError
from dear_batch.log import log_error, outcome

_FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("folder", type=_FOLDER)
@click.option("--json", "as_json", is_flag=True, help="One line of JSON instead of a table.")
def status(folder: Path, *, as_json: bool) -> None:
    """Say how far the job of an output folder is; reads only, and never disturbs a run.

    \b
    States: empty, planned, running, stopped, failed, listwise-outstanding, done, damaged.

    \b
    Examples:
      dear-batch status runs/tonight
      dear-batch status runs/tonight --json
    """  # noqa: D301 - click reads \b
    from dear_batch.run.status import status_of

    found = status_of(folder).to_json()
    if as_json:
        outcome(found)
        return
    from dear_batch.show import show, status_table

    show(status_table(found))


@click.command()
@click.argument("folders", nargs=-1, required=True, type=_FOLDER, metavar="FOLDER...")
def verify(folders: tuple[Path, ...]) -> None:
    """Check that finished output folders are what they were when they were published.

    Every file by size and sha256, the run by the rules of TREC evaluators and against its
    results line by line, and all counts. Needs no model, no network, and little memory.

    \b
    Exit codes: 0 all as published; 75 one is not finished; 77 one is not what its manifest says.

    \b
    Examples:
      dear-batch verify runs/tonight
      dear-batch verify runs/dt=*
    """  # noqa: D301 - click reads \b
    from dear_batch.run.verify import verify as verify_folder

    found, codes = list[dict[str, object]](), list[int]()
    for folder in folders:
        try:
            verdict = verify_folder(folder)
            if not verdict.ok:
                raise verdict.error()
        except DearBatchError as error:
            log_error(error)
            codes.append(error.exit_code)
            state = "unfinished" if isinstance(error, TryAgainError) else "failed"
            faults = {"error": error.what, "where": error.where}
            found.append({"folder": str(folder), "status": state, **faults})
        else:
            fields = asdict(verdict)
            del fields["faults"]
            found.append({"status": "ok", **fields})
            click.echo(
                f"{folder}: {verdict.files} files of {verdict.bytes:,} bytes, "
                f"{verdict.lines:,} lines of {verdict.queries:,} queries, "
                f"{verdict.quarantined:,} set aside, {verdict.parts} parts: as published"
            )
    code = next(iter(codes), 0)
    outcome({"status": "failed" if code else "ok", "exit_code": code, "folders": found})
    sys.exit(code)


@click.command()
@click.argument("folders", nargs=-1, required=True, type=_FOLDER, metavar="FOLDER...")
@click.option("--older-than", help="Also remove finished outputs that are older: 30d, 12h, 2w.")
@click.option("--dry-run", is_flag=True, help="Change nothing, and say what would go.")
def gc(folders: tuple[Path, ...], older_than: str | None, *, dry_run: bool) -> None:
    """Remove what dead runs left in output folders, and whole outputs by age.

    FOLDERs are output folders, or folders that hold them, such as one with a folder a
    partition. Only files that dear-batch names are removed, no link is followed, and a folder
    in which a job is at work is left alone.

    \b
    Examples:
      dear-batch gc runs/tonight
      dear-batch gc runs --older-than 30d --dry-run
    """  # noqa: D301 - click reads \b
    from dear_batch.run.gc import age_s, collect

    age = None if older_than is None else age_s(older_than)
    found, codes = [], list[int]()
    for item in collect(folders, older_than_s=age, dry_run=dry_run):
        fields = asdict(item)
        codes.append(fields.pop("exit_code"))
        found.append({name: value for name, value in fields.items() if value not in ("", [])})
        what = {"held": f"at work ({item.why})", "failed": item.why}.get(item.action, item.action)
        foreign = f"; not ours: {', '.join(item.foreign[:5])}" if item.foreign else ""
        click.echo(f"{item.folder}: {what}, {item.files} files, {item.bytes:,} bytes{foreign}")
    freed = sum(int(item["bytes"]) for item in found)
    code = next(filter(None, codes), 0)
    end = {"status": "failed" if code else "ok", "exit_code": code, "dry_run": dry_run}
    outcome({**end, "freed_bytes": freed, "folders": found})
    sys.exit(code)
