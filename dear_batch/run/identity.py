"""What decides a job's bytes: its inputs, models and settings, and what computes them.

The *job* is what the user asked for; a finished folder is compared with it alone. The *runtime*
is what turned out to compute it here, versions included; only commits of the same runtime are
kept. Both together make the fingerprint of a stage.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dear_batch import __version__
from dear_batch.bundle import hash_file
from dear_batch.machine import gpus
from dear_batch.run.inputs import Pin
from dear_batch.run.loading import Loaded
from dear_batch.run.waves import Ranker
from dear_batch.specs import ExecutionSpec, JobSpec, ListwiseSpec

Fields = dict[str, Any]


def digest(*fields: object) -> str:
    """The sha256 of JSON-able fields."""
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def job_fields(spec: JobSpec, pins: Sequence[Pin], bundle_sha256: str) -> Fields:
    """What was asked of the first stage, and of what is published."""
    return {
        "bundle_sha256": bundle_sha256,
        "inputs": [asdict(pin) for pin in pins],
        "pointwise": {"depth": spec.pointwise.depth, "interpolate": spec.pointwise.interpolate},
        "text_depth": spec.listwise.depth if spec.listwise else None,
        "output": {"tag": spec.output.tag, "run_per_input": spec.output.run_per_input},
        "row_tokens": spec.execution.row_tokens,
        "batch_tokens": spec.execution.batch_tokens,
    }


def listwise_settings(spec: ListwiseSpec, bundle_sha256: str | None) -> Fields:
    """What decides the order that a listwise stage gives; how much may fail does not.

    The bundle has no hash where stage 1 runs alone on a machine that lacks it.
    """
    settings = asdict(spec)
    del settings["max_failed_windows"], settings["bundle"]  # wherever it lies, its hash decides
    settings["step"] = spec.stride
    own = spec.prompt.endswith(".toml") and Path(spec.prompt).is_file()
    sha256 = hash_file(Path(spec.prompt)).sha256 if own else None
    return {**settings, "bundle_sha256": bundle_sha256, "prompt_file_sha256": sha256}


def pointwise_runtime(loaded: Loaded) -> Fields:
    """What computes the scores here."""
    scorer, choice = loaded.scorer, loaded.choice
    return {
        "tool": f"dear-batch {__version__}",
        "engine": scorer.engine,
        "engine_version": choice.engine_version(loaded.machine),
        "plan": choice.plan and str(choice.plan),
        "plan_sha256": choice.plan and choice.plan.sha256,
        "tokenizers": _version("tokenizers"),
        "device": scorer.device.partition(":")[0],
        "device_names": device_names(scorer.device),
        "precision": scorer.precision,
        "row_tokens": scorer.layout.row_tokens if scorer.layout.packed else None,
        "batch_tokens": scorer.layout.batch_tokens,
    }


def listwise_runtime(ranker: Ranker) -> Fields:
    """What computes the permutations here."""
    return {
        "tool": f"dear-batch {__version__}",
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "tokenizers": _version("tokenizers"),
        "device": ranker.device.partition(":")[0],
        "device_names": device_names(ranker.device),
        "precision": ranker.precision,
    }


def asked(execution: ExecutionSpec) -> Fields:
    """What the user asked of the runtime of the first stage; `auto` takes any."""
    wanted = {"engine": execution.engine, "device": execution.device.partition(":")[0]}
    return {name: value for name, value in wanted.items() if value != "auto"}


def device_names(device: str) -> list[str]:
    """What GPUs this machine has, where one is used: other ones give other low bits."""
    return [] if device == "cpu" else sorted({gpu.name for gpu in gpus()})


def _version(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    with suppress(ModuleNotFoundError):
        return version(package)
    return None
