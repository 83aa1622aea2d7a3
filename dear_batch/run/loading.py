"""Loads the model of the first stage: the best engine that this machine can trust."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from dear_batch.bundle import Bundle, open_bundle
from dear_batch.errors import EngineRefusedError
from dear_batch.machine import Machine, machine
from dear_batch.pointwise.recipe import PairEncoder
from dear_batch.pointwise.scorer import Scorer, open_scorer
from dear_batch.pointwise.selection import Choice, PassedOver, choose, refusal, told
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
    choice, scorer = _opened(bundle, facts, execution, watch)
    encoder = PairEncoder.from_file(bundle.file("tokenizer.json"), bundle.recipe)
    bundle.check_unchanged()
    check_first_run(bundle, scorer, encoder, choice, facts, watch=watch)
    return Loaded(bundle, encoder, scorer, choice, facts)


def _opened(
    bundle: Bundle, facts: Machine, execution: ExecutionSpec, watch: Watch
) -> tuple[Choice, Scorer]:
    """The best engine that loads; one that was asked for by name loads, or that is an error."""
    budgets = {"row_tokens": execution.row_tokens, "batch_tokens": execution.batch_tokens}
    refusals = list[PassedOver]()
    while True:
        choice = choose(bundle, facts, execution.engine, execution.device, refusals=refusals)
        watch.log("engine", **told(choice))
        watch.check()
        try:
            return choice, open_scorer(bundle, choice, **budgets)
        except EngineRefusedError as error:
            if execution.engine != "auto":
                raise
            refusals.append(refusal(choice, error))
        watch.log("engine-refused", level="warning", **asdict(refusals[-1]))
