"""What people see on a terminal: progress, steps and tables, by rich. Decides nothing.

Progress and notes go to stderr, and only where that is a terminal; tables that a command was
asked for go to stdout.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from dear_batch.pointwise.reference import Verdict

GB = 1e9


def show(renderable: RenderableType) -> None:
    """Print to stdout; wide enough for whole tables where it is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(renderable)


@contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """Tell each step of a long command as it begins, with the seconds since the start."""
    console = Console(stderr=True)
    start = console.get_time()

    def report(step: str) -> None:
        console.print(
            f"[dim]{console.get_time() - start:6.1f} s[/dim]  {escape(step)}", highlight=False
        )

    yield report
    report("done")


@contextmanager
def status(text: str) -> Iterator[None]:
    """A spinner while a command of unknown length works."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


@contextmanager
def progress(unit: str) -> Iterator[Callable[[str, float, int], None]]:
    """Bars fed with (name, done, total); each appears when it is first fed."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks = dict[str, TaskID]()

        def advance(name: str, done: float, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done, total=total)

        yield advance


def needs_table(needs: Mapping[str, int | None], name: str, task: str) -> None:
    """What an export needs beside what there is, on stderr."""
    table = Table(
        title=Text(f"{name}: {task}, {(needs['parameters'] or 0) / 1e6:,.0f} M parameters")
    )
    for column in ("", "needed", "here"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("memory (fp32 merge)", *_sizes(needs, "memory_bytes", "memory_available_bytes"))
    table.add_row("disk", *_sizes(needs, "disk_bytes", "disk_free_bytes"))
    Console(stderr=True).print(table)


def _sizes(needs: Mapping[str, int | None], *names: str) -> list[str]:
    sizes = [needs[name] for name in names]
    return ["unknown" if size is None else f"{size / GB:.1f} GB" for size in sizes]


def _print_for_people(table: Table) -> None:
    """Print to stderr, where that is a terminal: elsewhere its lines are a log's."""
    console = Console(stderr=True)
    if console.is_terminal:
        console.print(table)


def run_summary(report: Mapping[str, Any], folder: str) -> None:
    """What a job did, on a terminal; elsewhere stderr is for lines of JSON."""
    outputs = ", ".join(report["outputs"][:3]) or "the parts of stage 1"
    table = Table(title=Text(f"{folder}: {outputs}"), show_header=False)
    queries, candidates = report["queries"], report["candidates"]
    table.add_row("queries", f"{queries['written']:,} of {queries['read']:,} written")
    table.add_row("candidates", f"{candidates['written']:,} of {candidates['read']:,} written")
    for reason, count in report["quarantine_reasons"].items():
        table.add_row("set aside", f"{count:,} {reason}")
    table.add_row("truncated pairs", f"{report['truncated_pairs']:,}")
    rate = report["tokens_per_second"]
    table.add_row("tokens", f"{report['tokens']:,}" + (f" at {rate:,.0f}/s" if rate else ""))
    table.add_row("engine", f"{report['engine']} on {report['device']}, {report['precision']}")
    if share := busy(report):
        table.add_row("engine busy", share)
    for line in passed_over(report):
        table.add_row("passed over", Text(line))
    if listwise := report.get("listwise"):
        for name, value in listwise_facts(listwise).items():
            table.add_row(name, Text(value))
    table.add_row("seconds", f"{report['seconds']['total']:.1f}")
    _print_for_people(table)


def busy(report: Mapping[str, Any]) -> str:
    """How much of the time between its first and its last batch an engine had work."""
    idle = report.get("idle_share")  # reports of earlier versions have none
    return "" if idle is None else f"{1 - idle:.1%} from the first batch to the last"


def passed_over(found: Mapping[str, Any]) -> list[str]:
    """The engines that would have come first, each with why it did not, a line each."""
    by_why = dict[str, list[str]]()
    for item in found.get("passed_over", ()):  # reports of earlier versions have none
        by_why.setdefault(item["why"], []).append(f"{item['engine']} on {item['device']}")
    return [f"{', '.join(engines)}: {why}" for why, engines in by_why.items()]


def seconds_of(seconds: Mapping[str, float]) -> str:
    """What took how long."""
    return ", ".join(f"{name} {value:g}" for name, value in seconds.items())


def estimate_table(found: Mapping[str, Any]) -> None:
    """What a job will take, on a terminal."""
    table = Table(title=Text(f"{found['output']}: dry run"), show_header=False)
    for name in ("queries", "candidates"):
        counts = ", ".join(f"{count:,} {what}" for what, count in found[name].items())
        table.add_row(name, counts)
    for reason, count in found["quarantine_reasons"].items():
        table.add_row("would be set aside", f"{count:,} {reason}")
    table.add_row("pairs", f"{found['scored_pairs']:,}, {found['truncated_share']:.1%} truncated")
    table.add_row("tokens", f"about {found['tokens']:,}, from {found['sampled_pairs']:,} pairs")
    if listwise := found.get("listwise"):
        tokens = listwise["prompt_tokens"]
        known = "unknown" if tokens is None else f"about {tokens:,}"
        table.add_row("windows", f"{listwise['windows']:,}, {known} tokens of prompts")
    table.add_row("engine", f"{found['engine']} on {found['device']}")
    for line in passed_over(found):
        table.add_row("passed over", Text(line))
    rate = found["tokens_per_second"]
    unknown = "not known here: give --tokens-per-second, or run once"
    table.add_row("rate", f"{rate:,.0f} tokens/s ({found['rate_from']})" if rate else unknown)
    table.add_row("time", _duration(found["total_seconds"]))
    if found["cost"] is not None:
        table.add_row("cost", f"{found['cost']:,.2f}")
    space = found["space"]
    sizes = (f"{space[name] / GB:,.2f} GB" for name in ("needed_bytes", "free_bytes"))
    table.add_row("disk", "about {} needed, {} free".format(*sizes))
    _print_for_people(table)


def _duration(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"about {timedelta(seconds=round(seconds))}"


def status_table(found: Mapping[str, Any]) -> Table:
    """How far a job is."""
    result = f" ({found['result']})" if found["result"] else ""
    facts = {"state": found["state"] + result}
    if lock := found["lock"]:
        holds = {True: "held by", False: "last held by", None: "cannot be seen; last held by"}
        who = f"pid {lock['pid']} on {lock['host']} since {lock['start']}"
        facts["lock"] = f"{holds[lock['held']]} {who}"
    for stage, shards in found["stages"].items():
        facts[stage] = f"{shards['done']:,} of {shards['total']:,} shards"
    if found["queries_planned"] is not None:
        facts["planned"] = f"{found['queries_planned']:,} queries"
    for name in ("queries", "candidates"):
        counts = [f"{count:,} {what}" for what, count in found[name].items()]
        facts |= {name: ", ".join(counts)} if counts else {}
    if error := found["error"]:
        facts["error"] = "\n".join(filter(None, (error.get("what"), error.get("where"))))
    facts |= {"changed": found["updated"] or "never", "next": found["next"]}
    table = Table(title=Text(found["folder"]), show_header=False, title_justify="left")
    for name, value in facts.items():
        table.add_row(name, Text(value))
    return table


def listwise_facts(listwise: Mapping[str, Any]) -> dict[str, str]:
    """The second stage of a report in a few lines."""
    windows = listwise["windows"]
    by_status = [f"{windows[s]:,} {s}" for s in windows if s != "total" and windows[s]]
    facts = {
        "listwise": f"first {listwise['depth']} in windows of {listwise['window']} by "
        f"{listwise['step']}, prompt {listwise['prompt']}",
        "windows": f"{windows['total']:,}: {', '.join(by_status) or 'none'}",
        "listwise tokens": f"{listwise['prompt_tokens']:,} of prompts, "
        f"{listwise['answer_tokens']:,} of answers, {listwise['forwards']:,} forwards",
        "overruled tokens": f"{listwise['overruled']:,}",
        "passages": f"{listwise['cut_passages']:,} cut, "
        f"{listwise['shortened_passages']:,} shortened to fit, "
        f"{listwise['neutralised_texts']:,} texts with special tokens neutralised",
        "listwise model": f"on {listwise['device']}, {listwise['precision']}",
    }
    reasons = listwise["failed_reasons"].items()
    return facts | ({"failed": "; ".join(f"{n:,} {why}" for why, n in reasons)} if reasons else {})


def verdict_table(verdict: "Verdict") -> None:
    """Scores beside the printed ones."""
    table = Table(title=f"README example, {verdict.name}")
    for column in ("document", "here", "printed", "difference"):
        table.add_column(column, justify="right")
    for i, (found, expected) in enumerate(zip(verdict.scores, verdict.expected, strict=True)):
        table.add_row(str(i), f"{found:.4f}", f"{expected:.4f}", f"{found - expected:+.4f}")
    show(table)
