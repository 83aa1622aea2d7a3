import time
from typing import Any

import pytest

from dear_batch.run.watch import StoppedError
from dear_batch.run.worker import EventWatch

Events = list[dict[str, Any]]


@pytest.fixture
def sent() -> Events:
    return []


@pytest.fixture
def watch(sent: Events) -> EventWatch:
    return EventWatch(lambda event: sent.append(dict(event)))


def test_frequent_checks_are_few_beats(watch: EventWatch, sent: Events) -> None:
    start = time.monotonic()
    while len(sent) < 2:
        watch.check()
        time.sleep(0.001)
    assert 1 <= time.monotonic() - start < 30
    assert sent == [{"event": "beat"}] * 2


def test_a_check_leaves_once_it_was_asked_to(watch: EventWatch, sent: Events) -> None:
    watch.check()
    watch.stop.set()
    with pytest.raises(StoppedError):
        watch.check()
    assert len(sent) == 1


def test_frequent_advances_are_thinned_out_and_the_last_is_kept(
    watch: EventWatch, sent: Events
) -> None:
    for done in range(1000):
        watch.advance("pointwise", done, 1000)
    watch.advance("listwise", 1, 5)
    watch.shard("pointwise", "a")
    watch.phase("publish")
    assert len(sent) < 20
    assert sent[-4:-2] == [
        {"event": "advance", "stage": "listwise", "done": 1, "total": 5},
        {"event": "advance", "stage": "pointwise", "done": 999, "total": 1000},
    ]
    assert sent[-2:] == [
        {"event": "shard", "stage": "pointwise", "key": "a"},
        {"event": "phase", "name": "publish"},
    ]
