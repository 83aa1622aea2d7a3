"""The first time that an engine runs on a machine: does it score as PyTorch did at export?

Wrong kernels on a new driver are real. The package's own pairs are scored and compared with the
scores in the bundle's manifest; what agreed is remembered in the user's cache folder, by host,
model, engine and the versions of what it runs by, plan, device and driver. What did not is never
remembered.
"""

import hashlib
import json
import socket
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from dear_batch import __version__
from dear_batch.bundle import Bundle
from dear_batch.errors import ConfigurationError
from dear_batch.machine import Machine
from dear_batch.parity import GATES, Gate, Parity, compare
from dear_batch.pointwise.own_pairs import own_pairs
from dear_batch.pointwise.recipe import PairEncoder
from dear_batch.pointwise.scorer import Scorer, score_pairs
from dear_batch.pointwise.selection import Choice, build_command
from dear_batch.run.watch import Watch
from dear_batch.user_cache import cache_file, read_cache, write_cache

CACHE = "parity.json"
MAX_REMEMBERED = 512
# Engines differ by more than the graphs did on the machine that exported them.
FP32 = Gate(absolute=1e-3)
Fields = dict[str, Any]


def check_first_run(
    bundle: Bundle,
    scorer: Scorer,
    encoder: PairEncoder,
    choice: Choice,
    machine: Machine,
    *,
    watch: Watch,
) -> Parity | None:
    """Compare an engine with the bundle's own scores, unless that was done here before.

    Returns the figures, None where nothing was compared. The log is told before and after:
    on a CPU it takes a minute.

    Raises:
        ConfigurationError: the scores are too far apart.
        TryAgainError: there is no memory for a single pair.
    """
    reference_N = np.array(bundle.manifest.own_scores or (), np.float32)
    facts = facts_of(bundle, scorer, choice, machine)
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    known = _known()
    if not len(reference_N) or key in known:
        return None
    watch.log("first-run", pairs=len(reference_N), why="once for each engine and machine")
    lists = encoder.encode(own_pairs())
    pairs = [pair for pairs in lists for pair in pairs]
    found_N = score_pairs(scorer, pairs, lambda _batch: watch.check())
    ends = [*accumulate((len(pairs) for pairs in lists), initial=0)]
    spans = [slice(*both) for both in pairwise(ends)]
    parity = compare([reference_N[span] for span in spans], [found_N[span] for span in spans])
    # Rounded weights stay rounded in an engine that computes in fp32.
    coarsest = max(scorer.precision, bundle.manifest.precision, key=list(GATES).index)
    gate = FP32 if coarsest == "fp32" else GATES[coarsest]
    if misses := gate.misses(parity):
        raise _too_far(bundle, choice, machine, facts, misses)
    known[key] = {**facts, "max_abs_difference": parity.max_abs_difference}
    newest = dict(list(known.items())[-MAX_REMEMBERED:])
    write_cache(cache_file(CACHE), {"schema_version": 1, "agreed": newest})
    watch.log("first-run-parity", **asdict(parity))
    return parity


def facts_of(bundle: Bundle, scorer: Scorer, choice: Choice, machine: Machine) -> Fields:
    """What the scores and the speed depend on, and caches are keyed by."""
    on_cpu = scorer.device == "cpu"
    return {
        "host": socket.gethostname(),  # homes are shared by machines
        "tool": f"dear-batch {__version__}",
        "bundle_sha256": bundle.sha256,
        "engine": scorer.engine,
        "engine_version": choice.engine_version(machine),
        "beside": _beside(choice, machine),
        "plan_sha256": choice.plan.sha256 if choice.plan else None,
        "precision": scorer.precision,
        "device": machine.device_name(scorer.device),
        "driver": None if on_cpu else machine.driver.version,
    }


def _beside(choice: Choice, machine: Machine) -> str | None:
    """The package by which an engine runs a model, beside its own, and its version."""
    if choice.engine == "torch":
        with suppress(PackageNotFoundError):
            return f"transformers {version('transformers')}"
    if choice.engine == "tensorrt" and machine.cuda_core:
        return f"cuda-core {machine.cuda_core.version}"
    return None


def _known() -> dict[str, Any]:
    """What agreed here before."""
    fields = read_cache(cache_file(CACHE))
    if not isinstance(fields, dict) or fields.get("schema_version") != 1:
        return {}
    agreed = fields.get("agreed")
    return agreed if isinstance(agreed, dict) else {}


def _too_far(
    bundle: Bundle, choice: Choice, machine: Machine, facts: Fields, misses: str
) -> ConfigurationError:
    engine = f"{facts['engine']} {facts['engine_version']} ({facts['precision']})"
    driver = f", NVIDIA driver {facts['driver']}" if facts["driver"] else ""
    gpu = machine.gpu(choice.device) if choice.plan else None
    rebuild = f", or rebuild the engine: {build_command(bundle, machine, gpu)}" if gpu else ""
    update = ", or update the NVIDIA driver" if choice.device != "cpu" else ""
    other = "torch" if choice.engine == "onnxruntime" else "onnxruntime"
    return ConfigurationError(
        f"{engine} does not score here as PyTorch did when {bundle.folder} was exported; "
        "nothing was scored with it.",
        where=f"{facts['device']}{driver}: {misses}, over the package's own pairs",
        next_step=f"use another engine: --engine {other}{update}{rebuild}",
    )
