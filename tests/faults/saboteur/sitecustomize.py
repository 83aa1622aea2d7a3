"""Sabotages the process of a job, where this folder is on PYTHONPATH: `SABOTAGE` says how.

{"kind": …} of: poison (a document with `word` in it kills the process, where it is "scored" or
"encoded"), nan (such a document gets NaN), memory (calls of more than `tokens` find no memory),
hang (the engine sleeps for ever at call `call`, holding the GIL if `gil`), slow (each call takes
`seconds`), queries (a window whose query holds `word` kills the process), swap (at call `call`
the file `new` takes the place of `old`, by `rename` or not). `shard_bytes` makes shards small:
jobs of production size have hundreds of them.
"""

import json
import os
import sys
from typing import Any

SABOTAGE: dict[str, Any] = json.loads(os.environ.get("SABOTAGE", "{}"))


class Saboteur:
    """Stands between the encoder, the scorer and the job."""

    def __init__(self) -> None:
        from dear_batch.pointwise import onnx_scorer, recipe
        from dear_batch.run import plan

        plan.LEAST_SHARD_BYTES = plan.SHARD_BYTES = SABOTAGE["shard_bytes"]
        self._marked: set[bytes] = set()
        self._calls = 0
        encode, score = recipe.PairEncoder.encode, onnx_scorer.PackedOnnxScorer.score

        def sabotaged_encode(encoder: Any, lists: Any, known: Any = None) -> Any:
            kept = [(query, list(texts)) for query, texts in lists]
            found = encode(encoder, iter(kept), known)
            self._encoded(kept, found)
            return found

        def sabotaged_score(scorer: Any, batch: Any) -> Any:
            self._calls += 1
            getattr(self, f"_{SABOTAGE.get('kind', 'nothing')}")(batch)
            return self._falsified(batch, score(scorer, batch))

        if SABOTAGE.get("kind") == "queries":
            _sabotage_ranker()
        recipe.PairEncoder.encode = sabotaged_encode
        onnx_scorer.PackedOnnxScorer.score = sabotaged_score

    def _encoded(self, lists: Any, found: Any) -> None:
        for (_, texts), pairs in zip(lists, found, strict=True):
            for (_, text), pair in zip(texts, pairs, strict=True):
                if SABOTAGE.get("word", "\0") in text:
                    self._marked.add(pair.document_ids.tobytes())
                    if SABOTAGE.get("where") == "encoded":
                        _crash()

    def _is_marked(self, batch: Any) -> list[bool]:
        return [batch.pairs[d].document_ids.tobytes() in self._marked for d in batch.documents]

    def _falsified(self, batch: Any, scores: Any) -> Any:
        import numpy as np

        is_nan = SABOTAGE.get("kind") == "nan"
        return np.where(self._is_marked(batch), np.nan, scores) if is_nan else scores

    def _nothing(self, _batch: Any) -> None: ...

    _nan = _queries = _nothing

    def _poison(self, batch: Any) -> None:
        if any(self._is_marked(batch)):
            _crash()

    def _memory(self, batch: Any) -> None:
        if batch.tokens > SABOTAGE["tokens"]:
            raise MemoryError

    def _hang(self, _batch: Any) -> None:
        import ctypes
        import time

        if self._calls == SABOTAGE["call"]:
            if SABOTAGE["gil"]:
                ctypes.PyDLL(None).sleep(1000)
            time.sleep(1000)

    def _slow(self, _batch: Any) -> None:
        import time

        time.sleep(SABOTAGE["seconds"])

    def _swap(self, _batch: Any) -> None:
        import shutil
        from pathlib import Path

        if self._calls == SABOTAGE["call"]:
            if SABOTAGE["rename"]:
                Path(SABOTAGE["new"]).replace(SABOTAGE["old"])
            else:
                shutil.copyfile(SABOTAGE["new"], SABOTAGE["old"])


def _sabotage_ranker() -> None:
    from dear_batch.run import listwise

    open_ranker = listwise.open_ranker

    def sabotaged(*args: Any) -> Any:
        ranker = open_ranker(*args)
        rank = ranker.rank

        def killing(requests: Any, done: Any) -> Any:
            if any(SABOTAGE["word"] in request.query for request in requests):
                _crash()
            return rank(requests, done)

        ranker.rank = killing
        return ranker

    listwise.open_ranker = sabotaged


def _crash() -> None:
    import ctypes

    ctypes.string_at(0)


if SABOTAGE and "dear_batch.run.worker" in sys.orig_argv:
    Saboteur()
