"""Sabotages the process of a job, where this folder is on PYTHONPATH: `SABOTAGE` says how.

{"kind": …} of: poison (a document with `word` in it kills the process, where it is "scored" or
"encoded"), nan (such a document gets NaN), memory (calls of more than `tokens` find no memory),
hang (the engine sleeps for ever at call `call`, holding the GIL if `gil`), slow (each call takes
`seconds`), swap (at call `call` the file `new` takes the place of `old`).
"""

import json
import os
import sys

SABOTAGE = json.loads(os.environ.get("SABOTAGE", "{}"))


def _sabotage() -> None:
    import ctypes
    import shutil
    import signal
    import time

    import numpy as np

    from dear_batch.pointwise import onnx_scorer, recipe

    kind, marked, calls = SABOTAGE["kind"], set(), 0
    encode, score = recipe.PairEncoder.encode, onnx_scorer.PackedOnnxScorer.score

    def sabotaged_encode(self, lists):
        lists = [(query, list(texts)) for query, texts in lists]
        found = encode(self, iter(lists))
        for (_, texts), pairs in zip(lists, found, strict=True):
            for (_, text), pair in zip(texts, pairs, strict=True):
                if SABOTAGE.get("word", "\0") in text:
                    marked.add(pair.document_ids.tobytes())
                    if SABOTAGE.get("where") == "encoded":
                        os.kill(os.getpid(), signal.SIGSEGV)
        return found

    def sabotaged_score(self, batch):
        nonlocal calls
        calls += 1
        is_marked = [batch.pairs[d].document_ids.tobytes() in marked for d in batch.documents]
        if kind == "poison" and any(is_marked):
            ctypes.string_at(0)
        if kind == "memory" and batch.tokens > SABOTAGE["tokens"]:
            raise MemoryError
        if kind == "hang" and calls == SABOTAGE["call"]:
            if SABOTAGE.get("gil"):
                ctypes.PyDLL(None).sleep(1000)
            time.sleep(1000)
        if kind == "slow":
            time.sleep(SABOTAGE["seconds"])
        if kind == "swap" and calls == SABOTAGE["call"]:
            if SABOTAGE.get("rename"):
                os.replace(SABOTAGE["new"], SABOTAGE["old"])
            else:
                shutil.copyfile(SABOTAGE["new"], SABOTAGE["old"])
        scores = score(self, batch)
        return np.where(is_marked, np.nan, scores) if kind == "nan" else scores

    recipe.PairEncoder.encode = sabotaged_encode
    onnx_scorer.PackedOnnxScorer.score = sabotaged_score


if SABOTAGE and "dear_batch.run.worker" in sys.orig_argv:
    _sabotage()
