"""Each fuzz test is two: a few fixed examples, and, marked slow, many until its time is up."""

import pytest

from tests.fuzz.effort import SEED, Effort, Ran

_ALL: list[Ran] = []


@pytest.fixture(params=["few", pytest.param("many", marks=pytest.mark.slow)])
def effort(request: pytest.FixtureRequest) -> Effort:
    ran = Ran(request.node.nodeid.rpartition("/")[2])
    _ALL.append(ran)
    return Effort(ran, is_long=request.param == "many")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _ALL:
        terminalreporter.section(f"fuzz, DEAR_BATCH_FUZZ_SEED={SEED}")
    for ran in _ALL:
        terminalreporter.line(f"{ran.name}: {ran.examples} examples in {ran.seconds:.0f} s")
