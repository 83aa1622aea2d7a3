"""Runs a job on this machine: plan, stage 1, stage 2 where the job has one, publish.

Whatever is committed stays: running a job again is how it is resumed. A finished job run again
changes nothing. The two models are never loaded at once.
"""

import gc
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from dear_batch.bundle import open_bundle
from dear_batch.errors import UsageError
from dear_batch.machine import machine
from dear_batch.pointwise.selection import choose, told
from dear_batch.run import listwise, outcome, pointwise
from dear_batch.run.budgets import layout_of
from dear_batch.run.folder import (
    check_folder,
    clear,
    finished,
    locked,
    read_plan,
    refuse_other_engine,
    refuse_other_job,
    write_plan,
)
from dear_batch.run.identity import asked, listwise_runtime, pointwise_runtime
from dear_batch.run.inputs import Hashes, check_pins, recorded, recorded_of_source
from dear_batch.run.ledger import Commit, Ledger, discard, temporaries
from dear_batch.run.loading import load_pointwise
from dear_batch.run.plan import Plan
from dear_batch.run.planning import (
    Wanted,
    fitting_plan,
    new_plan,
    no_stage_one,
    outline,
    plan_again,
    wanted_now,
    with_runtime,
)
from dear_batch.run.pointwise import Poison
from dear_batch.run.publish import Finished, publish
from dear_batch.run.space import check_space
from dear_batch.run.stopwatch import Stopwatch
from dear_batch.run.watch import Watch
from dear_batch.specs import JobSpec, ListwiseSpec

Stages = Literal["all", "pointwise", "listwise"]
Fields = dict[str, Any]
Commits = dict[str, Commit]  # by shard


def run_job(
    spec: JobSpec,
    watch: Watch | None = None,
    *,
    stage: Stages = "all",
    restart: bool = False,
    poison: Poison | None = None,
    careful: bool = False,
) -> Fields:
    """Rerank all inputs of a spec and publish the output folder; returns the report.

    With `stage` "pointwise" a job of two stages ends with its parts, with "listwise" it
    begins with those that lie in the folder. `restart` forgets what an earlier run, of this
    job or another one, left in the folder. `poison` names what kills the process, by
    "<stage>/<shard>": ordinals of scored candidates (pointwise) or of lists (listwise).
    A `careful` run, after the process died of something, reads no shard before its turn.

    Raises:
        InputError, OutputError, TryAgainError, TrustError, ConfigurationError, UsageError:
            see each step. Nothing is published then; what is committed stays.
    """
    if spec.listwise is None and stage != "all":
        raise UsageError(
            f"The job has one stage, so there is no --stage {stage}.",
            valid="--listwise BUNDLE or a table [listwise], or no --stage",
        )
    folder = Path(spec.output.folder)
    check_folder(folder)
    with locked(folder):
        job = Job(spec, watch or Watch(), stage, poison or {}, careful)
        try:
            return job.run(restart=restart)
        except Exception as error:
            outcome.failed(spec, error, job.phase)
            raise


@dataclass
class Job:
    """One attempt at a job, by the holder of its folder's lock."""

    spec: JobSpec
    watch: Watch
    stage: Stages
    poison: Poison
    careful: bool
    clock: Stopwatch = field(default_factory=Stopwatch)
    started: float = field(default_factory=time.perf_counter)
    phase: str = "check"

    @cached_property
    def ledger(self) -> Ledger:
        """What is committed in the output folder."""
        return Ledger(Path(self.spec.output.folder))

    def run(self, *, restart: bool) -> Fields:
        """Do what is not done yet; returns the report."""
        folder = self.ledger.folder
        self._begin("check")
        for path in temporaries(folder):
            discard(path)
        wanted = wanted_now(self.spec, self.stage, folder)
        if restart:
            self._forget()
        elif (manifest := finished(folder)) and self._is_done(manifest, wanted):
            return outcome.again(self.spec, folder)
        return self._work(wanted)

    def _forget(self) -> None:
        """Begin anew, once nothing that can be seen now speaks against it.

        Where the second stage runs alone, what was published stays until it is whole.
        """
        execution, folder = self.spec.execution, self.ledger.folder
        if self.stage == "listwise":
            self.ledger.drop(listwise.STAGE)
            return
        self._check_engine(verify=True)
        if self.spec.listwise and self.stage == "all":
            listwise.prepare(self.spec.listwise, execution.device, paranoid=execution.paranoid)
        clear(folder, outcome.published_by(folder))

    def _check_engine(self, *, verify: bool) -> None:
        """Find out early whether what is asked for can run here; `verify` hashes the bundle."""
        folder, execution = self.spec.pointwise.bundle, self.spec.execution
        bundle = open_bundle(folder, "pointwise", verify=verify, paranoid=execution.paranoid)
        choose(bundle, machine(), execution.engine, execution.device)

    def _begin(self, phase: str) -> None:
        self.phase = phase
        self.watch.phase(phase)
        self.watch.check()

    def _is_done(self, manifest: Fields, wanted: Wanted) -> bool:
        """Whether what is published is what is wanted; another job is refused."""
        compared: Fields = {"job": wanted.job}
        if self.stage != "pointwise":
            compared["listwise"] = wanted.listwise
        is_other_stage = manifest["listwise"] != wanted.listwise
        if self.stage == "listwise" and manifest["job"] == wanted.job and is_other_stage:
            return False
        refuse_other_job(self.ledger.folder, manifest, compared, again=self.stage == "all")
        recorded_runtime = manifest["runtime"]["pointwise"]
        runtime = {**recorded_runtime, **asked(self.spec.execution)}
        if self.stage != "listwise":
            refuse_other_job(
                self.ledger.folder, {"runtime": recorded_runtime}, {"runtime": runtime}
            )
        if self.stage == "pointwise":  # asked for again, because a second stage lacks a part
            fields = read_plan(self.ledger.folder)
            return fields is not None and len(self._kept(fields)) == n_shards(fields)
        return True

    def _work(self, wanted: Wanted) -> Fields:
        """Plan, go through the stages, publish."""
        folder = self.ledger.folder
        self._begin("plan")
        plan: Plan | None = None
        with self.clock.timed("plan"):
            fields = fitting_plan(folder, wanted, self.stage)
            if fields is None:
                if self.stage != "listwise":
                    self._check_engine(verify=False)
                plan, fields = new_plan(self.spec, wanted, self.ledger, self.watch)
        commits = self._kept(fields)
        if self.stage != "listwise":
            fields, commits = self._stage_one(fields, plan, wanted, commits)
            gc.collect()  # the scorer is gone before the other model comes
        if self.stage == "pointwise":
            self.clock.seconds["total"] = time.perf_counter() - self.started
            return outcome.outstanding(self.spec, folder, fields, commits, self.clock)
        if len(commits) < n_shards(fields):
            raise no_stage_one(folder)
        found: Commits | None = None
        if self.spec.listwise:
            fields, found = self._stage_two(fields, commits, self.spec.listwise, wanted)
        return self._publish(fields, commits, found, wanted)

    def _kept(self, fields: Fields) -> Commits:
        """The commits of the first stage that hold."""
        fingerprint = fields["fingerprints"]["pointwise"]
        found: Commits = {}
        hashes: dict[tuple[int, ...], str | None] = {}
        if fingerprint:
            for shard in (shard for output in outline(fields) for shard in output.shards):
                if shard.inputs not in hashes:
                    hashes[shard.inputs] = recorded_of_source(self.ledger, shard.inputs)
                known = hashes[shard.inputs]
                commit = known and self.ledger.kept(pointwise.STAGE, shard.key, fingerprint, known)
                if commit:
                    found[shard.key] = commit
                self.watch.check()
        return found

    def _stage_one(
        self, fields: Fields, plan: Plan | None, wanted: Wanted, commits: Commits
    ) -> tuple[Fields, Commits]:
        """Score what is not committed; whatever would refuse stage 2 refuses before."""
        execution = self.spec.execution
        if self.spec.listwise and self.stage == "all":
            listwise.prepare(self.spec.listwise, execution.device, paranoid=execution.paranoid)
        if len(commits) == n_shards(fields):
            return fields, commits
        plan = plan or plan_again(fields, wanted, self.ledger, self.watch)
        check_space(self.spec, plan)
        self._begin("load")
        with self.clock.timed("load"):
            loaded = load_pointwise(self.spec.pointwise.bundle, execution, self.watch)
            known = fields["runtime"][pointwise.STAGE]
            # After a death no text is scored before its shard is named.
            calm = not (self.careful or self.poison)
            loaded.scorer.layout = layout_of(
                loaded, self.spec, plan, known, self.watch, calibrates=calm
            )
        fields = {**fields, "passed_over": told(loaded.choice)["passed_over"]}
        fields = self._with_runtime(fields, pointwise.STAGE, pointwise_runtime(loaded))
        todo = [(source, shard) for source, shard in plan.shards if shard.key not in commits]
        total = sum(output.n_queries for output in plan.outputs)
        done = total - sum(shard.n_queries for _, shard in todo)
        self._begin(pointwise.STAGE)
        self.watch.advance(pointwise.STAGE, done, total)
        with Hashes(wanted.pins, self.ledger, self.watch.check) as hashes:
            stage = pointwise.Stage(
                self.spec,
                plan,
                loaded.encoder,
                loaded.scorer,
                self.ledger,
                hashes,
                fields["fingerprints"][pointwise.STAGE],
                self.watch,
                self.poison,
                self.careful,
                loaded.bundle.check_unchanged,
            )
            new = {commit.shard: commit for commit in stage.run(todo, done, total)}
            hashes.check()
        return fields, commits | new

    def _stage_two(
        self, fields: Fields, commits: Commits, spec: ListwiseSpec, wanted: Wanted
    ) -> tuple[Fields, Commits]:
        """Re-rank what is not committed."""
        if fields["listwise"] != wanted.listwise:
            fields = self._other_listwise({**fields, "listwise": wanted.listwise})
        groups = listwise.groups_of(outline(fields), commits, self.ledger)
        flat = [group for some in groups for group in some]
        kept = self._kept_listwise(fields, flat)
        if len(kept) == len(flat):
            return fields, kept
        self._begin("load listwise")
        with self.clock.timed("load listwise"):
            execution = self.spec.execution  # anew: stage 1 may have taken hours
            bundle = listwise.prepare(spec, execution.device, paranoid=execution.paranoid)
            ranker = listwise.open_ranker(bundle, spec, execution.device)
        runtime = listwise_runtime(ranker)
        if self.stage == "listwise" and fields["runtime"]["listwise"] not in (None, runtime):
            fields, kept = self._other_listwise(fields), {}
        before = fields["fingerprints"][pointwise.STAGE]
        fields = self._with_runtime(fields, listwise.STAGE, runtime, before)
        self._begin(listwise.STAGE)
        stage = listwise.Stage(
            spec,
            ranker,
            self.ledger,
            fields["fingerprints"][listwise.STAGE],
            self.watch,
            self.poison,
            bundle.check_unchanged,
        )
        todo = [group for group in flat if group.key not in kept]
        total = sum(group.queries for group in flat)
        done = total - sum(group.queries for group in todo)
        self.watch.advance(listwise.STAGE, done, total)
        return fields, kept | {commit.shard: commit for commit in stage.run(todo, done, total)}

    def _kept_listwise(self, fields: Fields, groups: list[listwise.Group]) -> Commits:
        fingerprint = fields["fingerprints"]["listwise"]
        found: Commits = {}
        for group in groups if fingerprint else ():
            commit = self.ledger.kept(listwise.STAGE, group.key, fingerprint, group.sha256)
            if commit:
                found[group.key] = commit
            self.watch.check()
        return found

    def _other_listwise(self, fields: Fields) -> Fields:
        """Plan another second stage over the same first one."""
        self.ledger.drop(listwise.STAGE)
        fields = {
            **fields,
            "runtime": {**fields["runtime"], "listwise": None},
            "fingerprints": {**fields["fingerprints"], "listwise": None},
        }
        write_plan(self.ledger.folder, fields)
        return fields

    def _with_runtime(
        self, fields: Fields, stage: str, runtime: Fields, before: str = ""
    ) -> Fields:
        """Pin what computes a stage, or see that it is what began it."""
        known = fields["runtime"][stage]
        if known is None:
            fields = with_runtime(fields, stage, runtime, before)
            write_plan(self.ledger.folder, fields)
        else:
            refuse_other_engine(self.ledger.folder, known, runtime)
            refuse_other_job(self.ledger.folder, {"runtime": known}, {"runtime": runtime})
        return fields

    def _publish(
        self, fields: Fields, commits: Commits, found: Commits | None, wanted: Wanted
    ) -> Fields:
        folder = self.ledger.folder
        self._begin("publish")
        if self.stage != "listwise":
            check_pins(wanted.pins)
        outputs = []
        groups = listwise.groups_of(outline(fields), commits, self.ledger)
        for planned, some in zip(outline(fields), groups, strict=True):
            first = [commits[shard.key] for shard in planned.shards]
            second = None if found is None else [found[group.key] for group in some]
            outputs.append(Finished(planned.stem, first, second))
        self.clock.seconds["total"] = time.perf_counter() - self.started
        report = outcome.report(self.spec, fields, outputs, self.clock, self.ledger.attempt)
        inputs = [
            {**pin, "sha256": recorded(self.ledger, number)}
            for number, pin in enumerate(fields["job"]["inputs"])
        ]
        manifest = outcome.manifest(fields, inputs, outputs, report)
        publish(
            self.ledger,
            outputs,
            self.spec.output.tag,
            report=report,
            manifest=manifest,
            beat=self.watch.check,
        )
        outcome.record(folder, report)
        self.ledger.drop("regroup")
        for path in [*self.ledger.orphans()]:
            discard(path)
        return report


def n_shards(fields: Fields) -> int:
    """The shards of the first stage of a plan."""
    return sum(len(output.shards) for output in outline(fields))
