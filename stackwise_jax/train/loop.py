"""The loop: phases in order, one step after another. The only place with side effects and a clock.

Per phase: bring the caches to the phase's trunk, add its live stacks, train, evaluate, settle what freezes, save. A run
that was stopped continues from its newest snapshot with the same numbers as if it had not been.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from stackwise_jax.data.corpus import Corpus
from stackwise_jax.data.pipeline import make_batches
from stackwise_jax.errors import UserError
from stackwise_jax.memory import processes
from stackwise_jax.memory.fingerprint import tree_digest
from stackwise_jax.memory.placement import to_host
from stackwise_jax.memory.precision import to_storage
from stackwise_jax.schema import RunConfig
from stackwise_jax.train import checkpoint
from stackwise_jax.train.chained import make_chained_step
from stackwise_jax.train.checkpoint import open_folder
from stackwise_jax.train.curriculum import Phase, Role, Signature
from stackwise_jax.train.metrics import MetricsWriter, Progress, peak_flops, readable_time
from stackwise_jax.train.optimizer import schedule_fraction
from stackwise_jax.train.plan import Plan, describe, make_plan
from stackwise_jax.train.state import (
    Frozen,
    TrainState,
    fresh_lasting_parts,
    fresh_stacks,
    join_states,
    snapshot_shape,
    untie_head,
)
from stackwise_jax.train.step import make_evaluation, make_program, make_train_step
from stackwise_jax.train.trunk import TrunkInputs, store_maker
from stackwise_jax.types import Params

MAKE_STEP = {"fused": make_train_step, "chained": make_chained_step}


@dataclasses.dataclass
class Position:
    """Where a run stands: everything that is not an array."""

    phase: int = 0
    phase_step: int = 0
    step: int = 0
    done_flops: float = 0.0
    held_out: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run: the plan, the finished rack, and the held-out figures after every phase."""

    plan: Plan
    rack: Params
    held_out: dict[str, dict[str, float]]


@dataclasses.dataclass
class _Clock:
    """What has happened in a phase since its last log line."""

    logged: int
    data_seconds: float = 0.0
    is_first: bool = True

    def restart(self, logged: int) -> None:
        self.logged, self.data_seconds, self.is_first = logged, 0.0, False


def run(config: RunConfig, corpus: Corpus, workdir: Path | str, *, say: Callable[[str], None] = print) -> Result:
    """Trains a run to its end, from the beginning or from where its folder stands."""
    return Run(config, corpus, Path(workdir), say).to_end()


class Run:
    """One run in one process."""

    def __init__(self, config: RunConfig, corpus: Corpus, workdir: Path, say: Callable[[str], None]) -> None:
        self.config, self.corpus = config, corpus
        self.plan = make_plan(config, corpus.train.n_rows)
        order = self.plan.order
        self.program = make_program(config, corpus.tokenizer, n_rows=order.layout.n_rows)
        make_store = store_maker(self.plan, workdir, lambda line: self.progress.say(line))
        self.inputs = TrunkInputs(self.program, corpus, order, make_store)
        self.folder = open_folder(workdir, config)  # only after everything that may refuse the run
        self.folder.require_corpus(corpus.digest)
        self.position, self.frozen, self.references = Position(), Frozen(), _no_references()
        self.state = TrainState({}, {})
        self._steps: dict[Signature, Any] = {}
        self._evaluations: dict[Signature, Any] = {}
        workdir = processes.own_folder(workdir)
        (workdir / "tokenizer.model").write_bytes(corpus.tokenizer.model)
        text = describe(self.plan)
        checkpoint.write_text(workdir / "plan.txt", text + "\n")
        say(text)
        self._begin(say)
        isolate = config.data.isolate_documents  # every update draws one batch, so its number is the step's
        self.batches = iter(make_batches(corpus.train, order, isolate_documents=isolate, start=self.position.step))
        self.writer = MetricsWriter(workdir, resume_step=self.position.step)
        self.progress = Progress(
            total_flops=self.plan.flops, peak=peak_flops(config.logging.peak_flops, config.mesh.n_devices)
        )
        self.progress.count(self.position.done_flops)
        self._saved_at = time.monotonic()

    def to_end(self) -> Result:
        """Trains every phase that is left."""
        try:
            while self.position.phase < len(self.plan.phases):
                self._run_phase(self.plan.phases[self.position.phase], self.plan.signatures[self.position.phase])
            self.inputs.clear()
        finally:
            self.writer.close()
            self.inputs.release()
            self.folder.unlock()
        frozen = self.frozen
        stacks = [frozen.stacks[stack] for stack in sorted(frozen.stacks)]
        rack = {"embedding": frozen.embedding, "stacks": stacks, "head": frozen.head}
        return Result(self.plan, rack, self.position.held_out)

    # One phase.

    def _run_phase(self, phase: Phase, signature: Signature) -> None:
        if "stacks" not in self.state.params and phase.live_stacks:
            self.state = join_states(self.state, fresh_stacks(self.config, self.program.key, phase))
        self.inputs.prepare(phase, self.frozen, self.position.step, self.progress.note)
        started = time.perf_counter()
        frozen = self.frozen_parts(phase, signature)
        self._train(phase, signature, frozen)
        result = self._evaluate(phase, signature, frozen)
        self.position.held_out[phase.name] = result
        self.writer.write("held_out", self.position.step, {"phase": phase.name, **result})
        figures = ", ".join(f"{name} {value:.4f}" for name, value in result.items())
        self.progress.say(f"{phase.name}: held-out {figures} ({readable_time(time.perf_counter() - started)})")
        self._settle(phase)
        self.position.done_flops += self.plan.pass_flops[self.position.phase]
        self.progress.count(self.plan.pass_flops[self.position.phase])
        self.position.phase, self.position.phase_step = self.position.phase + 1, 0
        self._save()

    def _train(self, phase: Phase, signature: Signature, frozen: Params) -> None:
        config, position = self.config, self.position
        if signature not in self._steps:
            self._steps[signature] = MAKE_STEP[signature.execution](self.program, signature)
        step_function = self._steps[signature]
        pending: tuple[int, dict[str, Array]] | None = None
        clock = _Clock(position.phase_step)
        while position.phase_step < phase.steps:
            waited = time.perf_counter()
            batch = next(self.batches)
            clock.data_seconds += time.perf_counter() - waited
            batch, activations = self.inputs.training_batch(phase, batch, position.step)
            fraction = schedule_fraction(config.optimizer, position.phase_step, phase.steps)
            self.state, metrics = step_function(
                self.state,
                frozen,
                batch,
                activations,
                np.asarray(fraction, np.float32),
                np.asarray(position.step, np.int32),
            )
            position.step += 1
            position.phase_step += 1
            position.done_flops += self.plan.step_flops[position.phase]
            if pending is not None:  # the step before is done or nearly so: reading it now never idles the device
                self._log_when_due(phase, pending, clock)
            pending = (position.phase_step, metrics)
            if clock.is_first:  # it may have compiled, which is no measure of speed
                _read(pending)
                clock.restart(position.phase_step)
                self.progress.start_clock(self.plan.step_flops[position.phase])
            evaluates, saves = self._is_due(config.evaluation.every_steps, phase), self._snapshot_is_due(phase)
            if evaluates or saves:
                self._log_when_due(phase, pending, clock)  # waits for the step, so that its time is counted as its own
                pending = None
                with self.progress.untimed():
                    if evaluates:
                        values = self._evaluate(phase, signature, frozen)
                        self.writer.write("held_out", position.step, {"phase": phase.name, **values})
                    if saves:  # after everything that a continued run does not come by again
                        self._save()
        if pending is not None:
            self._log(phase, pending[0], _read(pending), clock)

    def _log_when_due(self, phase: Phase, pending: tuple[int, dict[str, Array]], clock: "_Clock") -> None:
        values = _read(pending)
        if pending[0] % self.config.logging.every_steps == 0:
            self._log(phase, pending[0], values, clock)

    def _log(self, phase: Phase, done: int, values: dict[str, float], clock: "_Clock") -> None:
        step = self.position.step - self.position.phase_step + done
        steps, flops = done - clock.logged, self.plan.step_flops[self.position.phase]
        rates: dict[str, float] = {}
        if steps:  # the first step of a phase is not timed
            rates = self.progress.measure(flops * steps, self.plan.tokens_per_step * steps, clock.data_seconds)
        clock.restart(done)
        self.writer.write("train", step, {"phase": phase.name, "phase_step": done, **values, **rates})
        self.progress.show(phase.name, done, phase.steps, values["loss"], rates)

    def _evaluate(self, phase: Phase, signature: Signature, frozen: Params) -> dict[str, float]:
        """Held-out loss of the path as it stands, in nats per weighted token; a causal model also in bits per byte."""
        if signature not in self._evaluations:
            self._evaluations[signature] = make_evaluation(self.program, signature)
        evaluate = self._evaluations[signature]
        sums = [
            evaluate(self.state.params, frozen, batch, activations)
            for batch, activations in self.inputs.held_out_batches(phase)
        ]
        total, weight = (float(sum(column)) for column in zip(*sums, strict=True))
        result = {"loss": total / max(weight, 1.0)}
        if self.config.objective.name == "clm":
            result["bits_per_byte"] = total / math.log(2) / max(self._held_out_bytes, 1)
        return result

    @functools.cached_property
    def _held_out_bytes(self) -> int:
        """Bytes of the text that the held-out loss asks for."""
        examples = (self.program.corrupt(self.program.mask_key, batch) for batch in self.inputs.held_out)
        count = self.corpus.tokenizer.scored_bytes
        return sum(count(np.asarray(example.targets), np.asarray(example.weights)) for example in examples)

    def frozen_parts(self, phase: Phase, signature: Signature) -> Params:
        """What the step runs through: only what it needs, so that equal signatures see equal trees."""
        stacks = [self.frozen.stacks[stack] for stack, role in phase.body if role is Role.FROZEN]
        parts: Params = {"frozen_stacks": stacks}
        if signature.head is Role.FROZEN:
            parts["head"] = self.frozen.head
        if signature.embedding is Role.FROZEN and not signature.head_has_table:
            parts["embedding"] = self.frozen.embedding
        return self.program.placement.to_weights(parts)

    # State: beginning, settling, saving, restoring.

    def _settle(self, phase: Phase) -> None:
        """Moves what freezes from the live state to the frozen rack and writes each part once."""
        state = untie_head(self.config, self.state) if phase.unties_head else self.state
        params, optimizer = dict(state.params), dict(state.optimizer)
        for stack, tree in zip(phase.live_stacks, params.pop("stacks", []), strict=True):
            self._freeze("stacks", str(stack), f"{stack:04d}", to_storage(tree, self.config.precision.trunk))
        optimizer.pop("stacks", None)
        if phase.live_stacks and phase.head is Role.LIVE and "head" not in phase.settles:
            last = phase.path[-1][0]
            self.references["taps"][str(last)] = self._write_tap(last, params["head"])
        for name in ("embedding", "head"):
            if name in phase.settles:
                self._freeze(name, name, name, params.pop(name))
                optimizer.pop(name)
        self.state = TrainState(params, optimizer)

    def _write_tap(self, stack: int, head: Params) -> str:
        """The head as it is after a stack, so that the rack can be read at that depth."""
        head = to_host(head)
        return self.folder.write_part(f"tap-{stack:04d}", head, tree_digest(head))

    def _freeze(self, kind: str, name: str, item: str, tree: Params) -> None:
        tree = to_host(tree)
        digest = tree_digest(tree)
        self.references[kind][name] = self.folder.write_part(item, tree, digest)
        self.frozen.keep(kind, name, tree, digest)

    def _is_due(self, every: int | None, phase: Phase) -> bool:
        """Every so many steps inside a phase; its last step is the boundary's business."""
        step = self.position.phase_step
        return every is not None and step % every == 0 and step < phase.steps

    def _snapshot_is_due(self, phase: Phase) -> bool:
        late = time.monotonic() - self._saved_at > 60 * self.config.checkpoint.every_minutes
        if processes.are_several():  # their clocks differ; asking the first one waits for the step, so it is seldom
            late = self._is_due(self.config.logging.every_steps, phase) and processes.agreed(late)
        return self._is_due(self.config.checkpoint.every_steps, phase) or (
            late and self.position.phase_step < phase.steps
        )

    def _save(self) -> None:
        position = dataclasses.asdict(self.position)
        meta = {"position": position, "parts": self.references}
        keep = self.config.checkpoint.keep
        self.folder.write_step(self.position.phase, self.position.step, to_host(self.state), meta, keep=keep)
        self._saved_at = time.monotonic()

    def _begin(self, say: Callable[[str], None]) -> None:
        """Starts from the newest snapshot, or from the seed where there is none."""
        config, key = self.config, self.program.key
        folder = checkpoint.latest_step(self.folder.path)
        if folder is None:
            self.state = fresh_lasting_parts(config, key, self.plan.phases[0], self.plan.signatures[0])
            return
        meta = checkpoint.read_meta(folder)
        self.position, self.references = Position(**meta["position"]), meta["parts"]
        self.frozen = checkpoint.read_frozen(self.folder.path, config, self.references)
        phase = self.position.phase
        at = "the end"
        if phase < len(self.plan.phases):
            inside = self.position.phase_step > 0
            shape = snapshot_shape(config, key, self.plan.phases[phase], self.plan.signatures[phase], inside=inside)
            self.state = self.program.placement.to_weights(checkpoint.read_tree(folder, shape))
            at = f"step {self.position.phase_step} of phase {self.plan.phases[phase].name}"
        say(f"continuing {self.folder.path} after {self.position.step} steps, at {at}")


def _no_references() -> dict[str, dict[str, str]]:
    return {"embedding": {}, "stacks": {}, "head": {}, "taps": {}}


def _read(pending: tuple[int, dict[str, Array]]) -> dict[str, float]:
    """Fetches the metrics of a step; stops the run before numbers that are not numbers are stored."""
    values = {name: float(value) for name, value in jax.device_get(pending[1]).items()}
    if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
        raise UserError(
            f"loss={values['loss']} and gradient norm={values['gradient_norm']} at phase step {pending[0]}; the run "
            "folder keeps the last good snapshot: lower optimizer.learning_rate, raise optimizer.warmup_fraction or "
            "compute in fp32, in a new --workdir"
        )
    return values
