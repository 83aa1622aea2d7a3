"""Every fault for real: real children, real signals; only the job's content is a stand-in."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dear_batch.errors import DearBatchError, InputError, TryAgainError
from dear_batch.run import child, interrupts
from dear_batch.run.supervisor import Outcome, supervise
from dear_batch.run.watch import StoppedError
from dear_batch.run.worker import spec_from_json, spec_to_json
from dear_batch.spec_files import load_spec
from dear_batch.specs import JobSpec, ListwiseSpec
from tests.run import fake_job
from tests.run.fake_parent import spec_of

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
LIMIT_S = 60  # of anything waited for here; a loaded machine is slow


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Children find the stand-in; returns the output folder."""
    fake_job.install(tmp_path)
    paths = [str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


Run = Callable[..., Outcome]


@pytest.fixture
def run(environment: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run([["die", "SIGSEGV", 1]], poison={"pointwise/a": [3]})`: supervise such a job."""

    def supervised(
        *steps: Any, poison: Any = None, probe: Any = (), stall_timeout_s: int = 60, **options: Any
    ) -> Outcome:
        monkeypatch.setenv("FAKE_JOB", json.dumps(steps))
        monkeypatch.setenv("FAKE_PROBE", json.dumps(probe))
        monkeypatch.setenv("FAKE_POISON", json.dumps(poison or {}))
        return supervise(spec_of(str(environment), stall_timeout_s), **options)

    return supervised


def facts(folder: Path, name: str) -> list[dict[str, Any]]:
    """What the stand-in noted: "starts" or "probes"."""
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def logged(capsys: pytest.CaptureFixture[str], event: str = "") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    return [line for line in lines if not event or line["event"] == event]


# What a child tells


def test_a_job_runs_in_a_child_and_its_report_comes_back(run: Run, environment: Path) -> None:
    outcome = run(stage="pointwise")
    assert outcome == Outcome({"status": "ok", "stage": "pointwise", "depth": 3, "exit_code": 0}, 0)
    (start,) = facts(environment, "starts")
    assert start["pid"] != os.getpid()
    assert (start["restart"], start["poison"]) == (False, {})


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.toml")), ids=lambda p: p.stem)
def test_every_spec_reaches_the_child_as_it_is(path: Path) -> None:
    spec = load_spec(path, JobSpec)
    assert spec_from_json(json.loads(json.dumps(spec_to_json(spec)))) == spec


def test_a_spec_with_everything_reaches_the_child_as_it_is() -> None:
    options = {
        "input.paths": ("a.parquet", "b c*.parquet"),
        "input.max_bad": "0.5%",
        "pointwise.bundle": "ü",
        "pointwise.interpolate": 1 / 3,
        "output.folder": "out",
        "output.run_per_input": True,
        "listwise.bundle": "l",
        "execution.batch_tokens": 4096,
    }
    spec = load_spec(None, JobSpec, options)
    assert isinstance(spec.listwise, ListwiseSpec)
    assert spec_from_json(json.loads(json.dumps(spec_to_json(spec)))) == spec


def test_progress_arrives_thinned_out_and_complete(run: Run) -> None:
    calls = list[tuple[str, float, int]]()
    run(["advance", 5000], advance=lambda *call: calls.append(call))
    assert calls[-1] == ("pointwise", 5000, 5000)
    assert 1 <= len(calls) < 500


def test_a_progress_bar_on_a_closed_terminal_is_no_reason_to_fail(environment: Path) -> None:
    code = (
        "import sys; from tests.run.fake_parent import spec_of\n"
        "from dear_batch.run.supervisor import supervise\n"
        "def advance(*_): raise OSError(5, 'Input/output error')\n"
        "sys.exit(40 + supervise(spec_of(sys.argv[1]), advance=advance).exit_code)"
    )
    jobs = {**os.environ, "FAKE_JOB": json.dumps([["advance", 9]])}
    command = [sys.executable, "-c", code, str(environment)]
    assert subprocess.run(command, env=jobs, check=False, timeout=LIMIT_S).returncode == 40


def test_logs_and_stray_output_of_a_child_reach_the_log(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        ["phase", "load"],
        ["say", "a library's warning, password=hunter2"],
        ["write_stdout", '{"event": "done", "result": {}}\nnative\r'],
        ["log", "committed", {"shard": "a", "level": "warning"}],
        ["environment", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"],
    )
    lines = logged(capsys)
    said = [line["line"] for line in lines if line["event"] == "stderr"]
    assert said == [
        "a library's warning, password=[redacted]",
        '{"event": "done", "result": {}}',
        "native",
    ]
    found = {line["event"]: line for line in lines}
    assert found["phase"]["name"] == "load"
    assert (found["committed"]["shard"], found["committed"]["level"]) == ("a", "warning")
    assert found["environment"]["HF_HUB_OFFLINE"] == "1"
    assert found["environment"]["TRANSFORMERS_OFFLINE"] == "1"


def test_an_error_of_the_job_arrives_in_all_its_parts(run: Run, environment: Path) -> None:
    with pytest.raises(InputError) as raised:
        run(["fail", "broken: https://u:pw123@host"])
    error = raised.value
    assert type(error) is InputError  # the child's own class is not known here
    assert error.exit_code == 65
    assert error.what == "broken: https://[redacted]@host"
    assert (error.where, error.valid, error.next_step) == ("a.parquet, row 3", "text", "mend it")
    assert len(facts(environment, "starts")) == 1


def test_a_bug_is_one_clear_message_and_a_traceback_in_the_log(
    run: Run, environment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DearBatchError) as raised:
        run(["crash", "off by one"])
    error = raised.value
    assert error.exit_code == 1
    assert error.what == "This is a bug in dear-batch: ValueError: off by one"
    assert "Traceback" not in str(error)
    (bug,) = logged(capsys, "bug")
    assert "fake_job.py" in bug["traceback"]
    assert len(facts(environment, "starts")) == 1


def test_the_parent_stays_light() -> None:
    code = (
        "import sys, dear_batch.run.supervisor\n"
        "print(sorted({'torch', 'onnxruntime', 'transformers', 'pyarrow', 'numpy', 'tokenizers'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_modules_beside_the_job_are_not_imported(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "elsewhere"
    place.mkdir()
    (place / "resource.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.chdir(place)
    assert run().exit_code == 0


# Deaths


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("SIGSEGV", "SIGSEGV"),
        ("SIGABRT", "SIGABRT"),
        ("SIGKILL", "SIGKILL"),
        ("exit", "exit code 7"),
    ],
)
def test_a_child_that_dies_is_started_again(
    run: Run, environment: Path, capsys: pytest.CaptureFixture[str], how: str, name: str
) -> None:
    outcome = run(["shard", "pointwise", "a"], ["enter", "pointwise", "b"], ["die", how, 1])
    assert outcome.exit_code == 0
    assert len(facts(environment, "starts")) == 2
    assert facts(environment, "probes") == []
    (died,) = logged(capsys, "died")
    assert (died["by"], died["where"]) == (name, "stage pointwise, shard b")
    assert ("hint" in died) == (how == "SIGKILL")


@pytest.mark.parametrize("phase", ["plan", "load", "publish"])
def test_a_second_death_outside_the_shards_is_the_end(
    run: Run, environment: Path, phase: str
) -> None:
    with pytest.raises(TryAgainError) as raised:
        run(["enter", "pointwise", "a"], ["phase", phase], ["say", "oh no"], ["die", "SIGKILL", 9])
    assert raised.value.where == f"phase {phase}"
    assert "SIGKILL" in raised.value.what
    assert "oh no" in raised.value.what
    assert "short of memory" in raised.value.next_step
    assert len(facts(environment, "starts")) == 2
    assert facts(environment, "probes") == []


Losses = list[tuple[str, str]]


@pytest.fixture
def losses(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Losses]:
    """The errors and phases that the supervisor has to report for the job that fails."""

    def found(*steps: Any, **options: Any) -> Losses:
        monkeypatch.setattr(child, "DUMP_S", 0.2)
        seen: Losses = []
        with pytest.raises(DearBatchError):
            run(*steps, **options, on_loss=lambda error, phase: seen.append((error.what, phase)))
        return seen

    return found


@pytest.mark.parametrize("steps", [[["die", "exit", 9]], [["hold_the_gil"]]])
def test_the_end_of_a_job_that_cannot_tell_is_reported_for_it(
    losses: Callable[..., Losses], steps: Any
) -> None:
    ((what, phase),) = losses(["phase", "load"], *steps, stall_timeout_s=2)
    assert what.startswith(("The process of the job keeps dying", "Nothing moved"))
    assert phase == "load"


def test_the_end_of_a_job_that_died_and_whose_search_failed_is_reported_for_it(
    losses: Callable[..., Losses],
) -> None:
    steps = [["phase", "pointwise"], ["enter", "pointwise", "a"], ["die", "SIGKILL", 9]]
    assert losses(*steps, probe=[["fail", "no"]]) == [("no", "pointwise")]


@pytest.mark.parametrize("step", [["fail", "what"], ["crash", "what"]])
def test_what_a_job_tells_itself_is_not_reported_again(
    losses: Callable[..., Losses], step: Any
) -> None:
    assert losses(["phase", "load"], step) == []


def test_what_a_restart_committed_is_not_discarded_by_the_next_start(
    run: Run, environment: Path
) -> None:
    run(
        ["phase", "plan"],
        ["die", "SIGKILL", 1],
        ["enter", "pointwise", "a"],
        ["phase", "publish"],
        ["die", "SIGKILL", 2],
        restart=True,
    )
    assert [start["restart"] for start in facts(environment, "starts")] == [True, True, False]


def test_documents_that_kill_are_found_and_left_out(
    run: Run, environment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run(
        ["shard", "pointwise", "a"],
        ["shard", "pointwise", "b"],
        ["shard", "listwise", "c"],
        poison={"pointwise/b": [0, 7, 19]},
    )
    assert outcome.exit_code == 0
    starts = facts(environment, "starts")
    assert [start["poison"] for start in starts] == [{}, {}, {"pointwise/b": [0, 7, 19]}]
    assert len({start["pid"] for start in starts}) == 3
    asked = facts(environment, "probes")
    assert {(a["stage"], a["shard"]) for a in asked} == {("pointwise", "b")}
    assert len(asked) - 1 <= 3 * (5 + 2)  # log2(20) rounded up; the first only counts
    (searched,) = logged(capsys, "searched")
    assert searched["ordinals"] == [0, 7, 19]


def test_a_shard_that_kills_and_none_of_its_documents_does(run: Run, environment: Path) -> None:
    with pytest.raises(TryAgainError) as raised:
        run(["enter", "listwise", "x"], ["die", "SIGABRT", 9])
    assert raised.value.where == "stage listwise, shard x"
    assert "SIGABRT" in raised.value.what
    assert raised.value.what == (
        "The process of the job keeps dying (SIGABRT); it said last:\n"
        "    Fatal Python error: Aborted"
    )
    assert len(facts(environment, "starts")) == 3
    assert len(facts(environment, "probes")) == 1 + 6


def test_a_shard_that_kills_twice_for_no_reason_gets_a_third_start(
    run: Run, environment: Path
) -> None:
    assert run(["enter", "listwise", "x"], ["die", "SIGKILL", 2]).exit_code == 0
    assert len(facts(environment, "starts")) == 3


def test_a_shard_of_nothing_but_poison_is_given_up(run: Run, environment: Path) -> None:
    with pytest.raises(TryAgainError, match=r"more than 8 .*SIGSEGV") as raised:
        run(["shard", "pointwise", "a"], poison={"pointwise/a": list(range(20))})
    assert raised.value.where == "stage pointwise, shard a"
    assert len(facts(environment, "probes")) <= 1 + 64


def test_probes_that_die_without_any_document_blame_none(run: Run, environment: Path) -> None:
    deadly = [["say", "the model does not load"], ["die", "exit", 99]]
    with pytest.raises(TryAgainError):
        run(["enter", "pointwise", "a"], ["die", "SIGSEGV", 99], probe=deadly)
    assert len(facts(environment, "starts")) == 3
    assert len(facts(environment, "probes")) == 1


def test_a_worker_that_cannot_even_start_is_given_up(
    run: Run, environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    with pytest.raises(TryAgainError, match="exit code 1"):
        run()
    assert facts(environment, "starts") == []


def test_a_worker_that_is_gone_before_it_is_asked(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = child.Child._ask

    def late(self: child.Child) -> None:
        self._process.wait()
        ask(self)

    monkeypatch.setattr(child, "worker_command", lambda: [sys.executable, "-c", "pass"])
    monkeypatch.setattr(child.Child, "_ask", late)
    with pytest.raises(TryAgainError, match=r"exit code 0.*nothing on stderr"):
        run()


def test_a_machine_without_a_process_to_give(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "worker_command", lambda: ["/nonexistent/python"])
    with pytest.raises(TryAgainError, match="cannot be started: No such file"):
        run()


# A watchdog


@pytest.mark.parametrize("how", ["hold_the_gil", "sleep_in_native_code"])
def test_a_child_in_which_nothing_moves_is_ended_with_its_stacks_in_the_log(
    run: Run,
    environment: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    monkeypatch.setattr(child, "DUMP_S", 0.5)
    start = time.monotonic()
    steps = [["phase", "pointwise"], ["enter", "pointwise", "a"], ["be_ready"], [how]]
    with pytest.raises(TryAgainError) as raised:
        run(*steps, stall_timeout_s=2)
    assert time.monotonic() - start < 20
    assert raised.value.where == "stage pointwise, shard a"
    assert raised.value.what == "Nothing moved for 2 s, so the job was ended."
    lines = logged(capsys)
    assert [line["where"] for line in lines if line["event"] == "stalled"]
    said = "\n".join(line["line"] for line in lines if line["event"] == "stderr")
    assert f"in {how}" in said
    assert "in _outlive_nobody" in said  # all threads
    assert not lives(int((environment / "ready").read_text()))
    assert len(facts(environment, "starts")) == 1


@pytest.mark.slow
def test_a_probe_in_which_nothing_moves_is_ended(run: Run, environment: Path) -> None:
    steps = [["enter", "pointwise", "a"], ["die", "SIGKILL", 9]]
    with pytest.raises(TryAgainError, match="Nothing moved"):
        run(*steps, probe=[["be_ready"], ["hold_the_gil"]], stall_timeout_s=2)
    assert not lives(int((environment / "ready").read_text()))


@pytest.mark.slow
def test_batches_are_a_sign_of_life(run: Run) -> None:
    assert run(["work", 5], stall_timeout_s=3).exit_code == 0


# Signals, and the parent's own end


class Parent:
    """A process that supervises, as the command line does."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "run" / "fake_parent.py"), folder, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def child(self) -> int:
        """The process at work, once it has come to the step `be_ready`."""
        path = self.folder / "ready"
        wait_for(lambda: path.exists() and path.read_text())
        return int(path.read_text())

    def end(self) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
        """Exit code, outcome, log."""
        out, err = self.process.communicate(timeout=LIMIT_S)
        (line,) = out.splitlines()
        return self.process.returncode, json.loads(line), [json.loads(x) for x in err.splitlines()]


def wait_for(condition: Callable[[], Any], limit_s: float = LIMIT_S) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def lives(pid: int) -> bool:
    """Whether a process is there and no zombie, which waits only for whoever adopted it."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def start(environment: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Parent]]:
    """`start([["work", 60]])`: such a job in a process of its own."""
    parents = list[Parent]()

    def started(*steps: Any, arguments: tuple[str, ...] = (), probe: Any = ()) -> Parent:
        monkeypatch.setenv("FAKE_JOB", json.dumps(steps))
        monkeypatch.setenv("FAKE_PROBE", json.dumps(probe))
        parents.append(Parent(environment, *arguments))
        return parents[-1]

    yield started
    for parent in parents:
        parent.process.kill()
        parent.process.communicate()


PHASES = [
    [["phase", "plan"]],
    [["phase", "load"]],
    [["phase", "pointwise"], ["enter", "pointwise", "a"]],
    [["phase", "listwise"], ["enter", "listwise", "a"]],
    [["enter", "pointwise", "a"], ["phase", "publish"]],
]


@pytest.mark.parametrize("steps", PHASES, ids=lambda steps: steps[-1][1])
def test_sigterm_stops_a_job_in_every_phase(start: Callable[..., Parent], steps: Any) -> None:
    parent = start(*steps, ["be_ready"], ["work", 60])
    child = parent.child()
    parent.process.terminate()
    code, outcome, lines = parent.end()
    assert (code, outcome["exit_code"]) == (75, 75)
    assert outcome["status"] == "stopped"
    assert "stopped" in outcome["error"]["what"]
    assert lines[-1]["next"] == "run the same command again: it goes on from there"
    assert [line["signal"] for line in lines if line["event"] == "stopping"] == ["SIGTERM"]
    assert not [line for line in lines if line["event"] in {"killing", "died", "restarting"}]
    assert not lives(child)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_stop_a_job(
    start: Callable[..., Parent], number: signal.Signals
) -> None:
    parent = start(["be_ready"], ["work", 60])
    child = parent.child()
    parent.process.send_signal(number)
    code, outcome, _ = parent.end()
    assert (code, outcome["exit_code"]) == (75, 75)
    assert not lives(child)


def test_under_nohup_a_closed_terminal_stops_nothing(start: Callable[..., Parent]) -> None:
    parent = start(["be_ready"], ["work", 1], arguments=("nohup",))
    parent.child()
    parent.process.send_signal(signal.SIGHUP)
    code, outcome, _ = parent.end()
    assert (code, outcome["status"]) == (0, "ok")


def test_a_second_ctrl_c_kills_at_once(start: Callable[..., Parent]) -> None:
    parent = start(["phase", "load"], ["be_ready"], ["hold_the_gil"])
    child = parent.child()
    parent.process.send_signal(signal.SIGINT)
    time.sleep(0.3)  # two signals that arrive together are one
    began = time.monotonic()
    parent.process.send_signal(signal.SIGINT)
    code, outcome, lines = parent.end()
    assert time.monotonic() - began < 5
    assert (code, outcome["exit_code"]) == (75, 75)
    assert "killing" in {line["event"] for line in lines}
    assert not lives(child)


def test_a_child_that_does_not_heed_a_signal_is_killed(
    run: Run, environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupts, "GRACE_S", 1.0)
    ready = environment / "ready"

    def terminate() -> None:
        wait_for(ready.exists)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    with pytest.raises(StoppedError, match="SIGTERM"):
        run(["phase", "load"], ["be_ready"], ["hold_the_gil"])
    thread.join()
    assert not lives(int(ready.read_text()))


@pytest.mark.slow
def test_a_child_that_does_not_heed_a_signal_is_killed_within_20_seconds(
    start: Callable[..., Parent],
) -> None:
    parent = start(["phase", "load"], ["be_ready"], ["hold_the_gil"])
    child = parent.child()
    began = time.monotonic()
    parent.process.terminate()
    code, outcome, _ = parent.end()
    assert interrupts.GRACE_S <= time.monotonic() - began < 20
    assert (code, outcome["exit_code"]) == (75, 75)
    assert not lives(child)


def test_sigterm_ends_a_search_for_poison(start: Callable[..., Parent]) -> None:
    probe = [["be_ready"], ["work", 60]]
    parent = start(["enter", "pointwise", "a"], ["die", "SIGKILL", 9], probe=probe)
    child = parent.child()
    parent.process.terminate()
    code, outcome, _ = parent.end()
    assert (code, outcome["exit_code"]) == (75, 75)
    assert len(facts(parent.folder, "probes")) == 1
    assert not lives(child)


def test_a_signal_before_the_child_exists_counts(
    run: Run, environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = interrupts.Interrupts.check

    def terminated(self: interrupts.Interrupts) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        check(self)

    monkeypatch.setattr(interrupts.Interrupts, "check", terminated)
    with pytest.raises(StoppedError):
        run()
    assert facts(environment, "starts") == []


def test_a_signal_while_the_child_starts_counts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = child.Child._ask

    def terminated(self: child.Child) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        ask(self)

    monkeypatch.setattr(child.Child, "_ask", terminated)
    with pytest.raises(StoppedError):
        run(["work", 60])


def test_a_signal_to_the_child_alone_stops_the_job(start: Callable[..., Parent]) -> None:
    parent = start(["be_ready"], ["work", 60])
    os.kill(parent.child(), signal.SIGTERM)
    code, outcome, _ = parent.end()
    assert (code, outcome["exit_code"]) == (75, 75)


def test_a_signal_to_a_child_that_does_not_listen_yet_stops_the_job(
    run: Run, environment: Path
) -> None:
    with pytest.raises(StoppedError, match="SIGTERM"):
        run(["die", "SIGTERM", 9])
    assert len(facts(environment, "starts")) == 1


def test_signals_are_the_callers_again_afterwards(run: Run) -> None:
    before = [signal.getsignal(number) for number in interrupts.STOPS]
    run()
    assert [signal.getsignal(number) for number in interrupts.STOPS] == before


@pytest.mark.parametrize("step", [["work", 60], ["hold_the_gil"], ["sleep_in_native_code"]])
def test_a_parent_that_is_killed_leaves_no_child(start: Callable[..., Parent], step: Any) -> None:
    parent = start(["be_ready"], step)
    child = parent.child()
    assert lives(child)
    parent.process.kill()
    parent.process.wait()
    wait_for(lambda: not lives(child), limit_s=2)


def test_a_parent_that_is_killed_leaves_no_probe(start: Callable[..., Parent]) -> None:
    probe = [["be_ready"], ["hold_the_gil"]]
    parent = start(["enter", "pointwise", "a"], ["die", "SIGKILL", 9], probe=probe)
    child = parent.child()
    parent.process.kill()
    parent.process.wait()
    wait_for(lambda: not lives(child), limit_s=2)


def test_without_help_of_the_kernel_the_end_of_stdin_ends_the_child(environment: Path) -> None:
    code = "import sys; sys.platform = 'other'; import dear_batch.run.worker as w; w.main()"
    request = {"parent": os.getpid(), "job": {"spec": spec_to_json(spec_of(str(environment)))}}
    request["job"] |= {"stage": "all", "restart": False, "careful": False, "poison": {}}
    worker = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "FAKE_JOB": json.dumps([["be_ready"], ["work", 60]])},
    )
    assert worker.stdin
    worker.stdin.write(json.dumps(request).encode() + b"\n")
    worker.stdin.flush()
    wait_for((environment / "ready").exists)
    worker.stdin.close()
    assert worker.wait(LIMIT_S) == 75


def test_a_worker_whose_parent_is_another_does_nothing(environment: Path) -> None:
    request = json.dumps({"parent": 1, "job": {}}) + "\n"
    command = [sys.executable, "-m", "dear_batch.run.worker"]
    for sent in (request, ""):
        done = subprocess.run(command, input=sent, text=True, capture_output=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (75, "", "")
    assert facts(environment, "starts") == []


def test_a_terminal_that_is_gone_is_no_reason_to_fail(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [["advance", 5], ["be_ready"], ["work", 1], ["advance", 9]]
    monkeypatch.setenv("FAKE_JOB", json.dumps(steps))
    ours, theirs = pty.openpty()
    script = str(ROOT / "tests" / "run" / "fake_parent.py")
    command = [sys.executable, script, str(environment)]
    with subprocess.Popen(command, stderr=theirs, stdout=subprocess.PIPE) as parent:
        os.close(theirs)
        wait_for((environment / "ready").exists)
        os.close(ours)
        assert parent.stdout
        assert json.loads(parent.stdout.read())["status"] == "ok"
    assert parent.returncode == 0


def test_nobody_reading_is_no_reason_to_fail(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "FAKE_JOB", json.dumps([["phase", "load"], ["say", "x"], ["shard", "p", "a"]])
    )
    script = str(ROOT / "tests" / "run" / "fake_parent.py")
    for redirection in (">&- 2>&-", "2>/dev/full >/dev/full", "2>&- | true"):
        command = f'"$0" "$@" {redirection}; echo ${{PIPESTATUS[0]}}'
        done = subprocess.run(
            ["bash", "-c", command, sys.executable, script, str(environment)],
            capture_output=True,
            text=True,
            check=True,
            timeout=LIMIT_S,
        )
        assert done.stdout == "0\n"
    assert len(facts(environment, "starts")) == 3
