"""Loads the model of the first stage: the best engine that this machine can trust."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from dear_batch.bundle import Bundle, open_bundle
from dear_batch.machine import Machine, machine
from dear_batch.pointwise.recipe import PairEncoder
from dear_batch.pointwise.scorer import Scorer, open_scorer
from dear_batch.pointwise.selection import Choice, choose, told
from dear_batch.run.first_run import check_first_run
from dear_batch.run.watch import Watch
from dear_batch.specs import ExecutionSpec


@dataclass(frozen=True, slots=True)
class Loaded:
    """A pointwise bundle, ready to score, and how its engine was chosen."""

    bundle: Bundle
    encoder: PairEncoder
    scorer: Scorer
    choice: Choice
    machine: Machine


def load_pointwise(
    folder: str | Path,
    execution: ExecutionSpec | None = None,
    watch: Watch | None = None,
    here: Callable[[], Machine] = machine,
) -> Loaded:
    """Load a bundle, every file checked, into the best engine of what `execution` allows.

    Raises:
        TrustError: a file of the bundle, or the plan, is not what the manifest names.
        ConfigurationError: no pointwise bundle, nothing that can run it here, or scores that
            are too far from those of the export.
        TryAgainError: there is no memory for the model.
    """
    execution, watch = execution or ExecutionSpec(), watch or Watch()
    bundle = open_bundle(folder, task="pointwise", paranoid=execution.paranoid)
    facts = here()
    choice = choose(bundle, facts, execution.engine, execution.device)
    watch.log("engine", **told(choice))
    watch.check()
    budgets = {"row_tokens": execution.row_tokens, "batch_tokens": execution.batch_tokens}
    scorer = open_scorer(bundle, choice, **budgets)
    encoder = PairEncoder.from_file(bundle.file("tokenizer.json"), bundle.recipe)
    bundle.check_unchanged()
    parity = check_first_run(bundle, scorer, encoder, choice, facts, beat=watch.check)
    if parity:
        watch.log("first-run-parity", **asdict(parity))
    return Loaded(bundle, encoder, scorer, choice, facts)
