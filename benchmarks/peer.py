"""One side of `peers.py` in a process of its own, in the environment of its package.

The first line of stdin is the lists as JSON, each a query and its texts; then comes a line a
request. Answers go, a JSON line each, to what stdout was; what a package prints goes to stderr.

    python benchmarks/peer.py SIDE MODEL
"""

import json
import os
import sys
import time
from typing import Any

from installed import versions
from peer_sides import SIDES, THREADS, Lists, pairs_of

PACKAGES = (
    *("torch", "transformers", "sentence-transformers", "rerankers", "optimum-onnx"),
    *("onnxruntime", "onnxruntime-gpu", "tokenizers", "dear-batch"),
)

WARM_UP = 4  # pairs


def serve(name: str, model: str) -> None:
    """Load, say so, then answer until stdin ends; an error is an answer, and the last one."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    lists = json.loads(sys.stdin.readline())
    try:
        start = time.perf_counter()
        side = SIDES[name](model)
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(THREADS)
        seconds = round(time.perf_counter() - start, 1)
        query, texts = lists[0]
        side.score([(query, texts[:WARM_UP])], WARM_UP)
        print(json.dumps({"load_seconds": seconds, "versions": versions(PACKAGES)}), file=answers)
        for line in sys.stdin:
            request = json.loads(line)
            if request["do"] == "ids":
                found = {"ids": side.ids(pairs_of(lists))}
            else:
                found = timed(side, lists, request["batch"])
            print(json.dumps(found), file=answers)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        print(json.dumps({"error": reason}), file=answers)
        raise


def timed(side: Any, lists: Lists, batch: int) -> dict[str, Any]:
    """Text in, scores out: all of it is on the clock."""
    start, cpu_start = time.perf_counter(), time.process_time()
    scores = side.score(lists, batch)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    found = {"scores": scores, "seconds": round(seconds, 3), "cpu_seconds": round(cpu_seconds, 3)}
    return found | getattr(side, "facts", {})


if __name__ == "__main__":
    serve(*sys.argv[1:])
