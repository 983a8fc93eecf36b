"""The loop: phases in order, one step after another. The only place with side effects and a clock.

Per phase: bring the caches to the phase's trunk, add its live stacks, train, evaluate, settle what freezes, save. A run
that was stopped continues from its newest snapshot with the same numbers as if it had not been.
"""

import copy
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array

from stackwise_jax.data.corpus import Corpus
from stackwise_jax.data.pipeline import make_batches
from stackwise_jax.errors import StoppedError, UserError, is_out_of_memory
from stackwise_jax.memory import processes
from stackwise_jax.memory.placement import to_host
from stackwise_jax.memory.precision import to_storage
from stackwise_jax.schema import RunConfig
from stackwise_jax.train.chained import make_chained_step
from stackwise_jax.train.checkpoint import write_text
from stackwise_jax.train.curriculum import Phase, Role, Signature
from stackwise_jax.train.folder import Part, make_part, step_name
from stackwise_jax.train.health import TRY, explain_memory, read_metrics, require_finite
from stackwise_jax.train.metrics import MetricsWriter, Progress, peak_flops, readable_time
from stackwise_jax.train.optimizer import schedule_fraction
from stackwise_jax.train.plan import Plan, describe, make_plan
from stackwise_jax.train.signals import StopSignals
from stackwise_jax.train.state import Frozen, TrainState, fresh_lasting_parts, fresh_stacks, join_states, untie_head
from stackwise_jax.train.step import make_evaluation, make_program, make_train_step
from stackwise_jax.train.trunk import TrunkInputs, cache_tier, make_cache_store, shard_folder
from stackwise_jax.train.watched import open_folder
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
        self.progress = Progress(
            total_flops=self.plan.flops, peak=peak_flops(config.logging.peak_flops, config.mesh.n_devices)
        )
        shards = shard_folder(config, workdir)
        self._tier = cache_tier(self.plan, shards)
        make_store = functools.partial(make_cache_store, self.plan, self._tier, shards, self._warn)
        self.inputs = TrunkInputs(self.program, corpus, order, make_store)
        self.folder = open_folder(workdir, config, say=self._warn)  # only after everything that may refuse the run
        self.position, self.frozen, self.references = Position(), Frozen(), _no_references()
        self.state = TrainState({}, {})
        self._steps: dict[Signature, Any] = {}
        self._evaluations: dict[Signature, Any] = {}
        self._signals = StopSignals()
        self._clock = _Clock(0)
        self._pending: tuple[int, dict[str, Array]] | None = None  # metrics of the last step, not read yet
        self._unsaved: list[Part] = []  # frozen parts that the next snapshot brings to the disk
        try:
            self._begin(say)
        except BaseException:
            self.folder.close()  # a notebook may try again
            raise
        isolate = config.data.isolate_documents  # every update draws one batch, so its number is the step's
        self.batches = iter(make_batches(corpus.train, order, isolate_documents=isolate, start=self.position.step))
        self.writer = MetricsWriter(processes.own_folder(workdir), resume_step=self.position.step)
        self.progress.count(self.position.done_flops)
        self._saved_at = time.monotonic()

    def to_end(self) -> Result:
        """Trains every phase that is left.

        Raises:
          StoppedError: a signal came; everything is saved, and the same run continues where it stopped.
          UserError: a number that is none, a disk that is full, a device without memory.
        """
        with self._signals:
            try:
                while self.position.phase < len(self.plan.phases):
                    self._run_phase(self.plan.phases[self.position.phase], self.plan.signatures[self.position.phase])
                self.folder.flush()
                self.inputs.clear()
            except StoppedError as stop:
                raise StoppedError(self._leave(str(stop))) from None
            except RuntimeError as error:
                if is_out_of_memory(error):
                    index = min(self.position.phase, len(self.plan.phases) - 1)
                    raise UserError(explain_memory(self.plan, index, error)) from None
                raise
            finally:
                self.folder.close()
                self.writer.close()
                self.inputs.release()
        frozen = self.frozen
        stacks = [frozen.stacks[stack] for stack in sorted(frozen.stacks)]
        rack = {"embedding": frozen.embedding, "stacks": stacks, "head": frozen.head}
        return Result(self.plan, rack, self.position.held_out)

    def _warn(self, text: str) -> None:
        self.progress.say(f"warning: {text}")

    def _note(self, text: str) -> None:
        """Shows passing work, called often inside it: where a signal is answered."""
        self._signals.poll()
        self.progress.note(text)

    def _leave(self, signal: str) -> str:
        """Saves what has been done since the last snapshot; says where the run stands."""
        self.folder.flush()
        position = self.position
        if position.phase_step and self.folder.newest != step_name(position.step, position.phase):
            self._read_pending(self.plan.phases[position.phase])
            require_finite(self.state, self._where())
            self._save(required=True)
            self.folder.flush()
        return f"stopped by {signal}: {self.folder.path} stands after {self._where()}; the same command continues"

    def _where(self) -> str:
        phases, position = self.plan.phases, self.position
        if position.phase == len(phases):
            return f"{position.step} steps, at the end"
        return f"{position.step} steps, at step {position.phase_step} of phase {phases[position.phase].name}"

    # One phase.

    def _run_phase(self, phase: Phase, signature: Signature) -> None:
        if "stacks" not in self.state.params and phase.live_stacks:
            self.state = join_states(self.state, fresh_stacks(self.config, self.program.key, phase))
        if self._tier == "disk":
            self.folder.flush()  # a cache that outlives this process must not get ahead of what the folder holds
        self.inputs.prepare(phase, self.frozen, self.position.step, self._note)
        started = time.perf_counter()
        frozen = self.frozen_parts(phase, signature)
        self._train(phase, signature, frozen)
        result = self._evaluate(phase, signature, frozen)
        self.position.held_out[phase.name] = result
        self.writer.write("held_out", self.position.step, {"phase": phase.name, **result})
        figures = ", ".join(f"{name} {value:.4f}" for name, value in result.items())
        self.progress.say(f"{phase.name}: held-out {figures} ({readable_time(time.perf_counter() - started)})")
        require_finite(self.state, self._where())
        self._settle(phase)
        self.position.done_flops += self.plan.pass_flops[self.position.phase]
        self.progress.count(self.plan.pass_flops[self.position.phase])
        self.position.phase, self.position.phase_step = self.position.phase + 1, 0
        self._save(required=True)

    def _train(self, phase: Phase, signature: Signature, frozen: Params) -> None:
        if signature not in self._steps:
            self._steps[signature] = MAKE_STEP[signature.execution](self.program, signature)
        self._clock = _Clock(self.position.phase_step)
        self._pause(phase, signature, frozen)  # a signal may have come in the middle of the last step's evaluation
        while self.position.phase_step < phase.steps:
            self._step(self._steps[signature], phase, frozen)
            self._pause(phase, signature, frozen)
        self._read_pending(phase)

    def _step(self, step_function: Any, phase: Phase, frozen: Params) -> None:
        config, position = self.config, self.position
        waited = time.perf_counter()
        batch = next(self.batches)
        self._clock.data_seconds += time.perf_counter() - waited
        fraction = schedule_fraction(config.optimizer, position.phase_step, phase.steps)
        scalars = self.program.placement.to_small(np.float32(fraction), np.int32(position.step))
        batch, activations = self.inputs.training_batch(phase, batch, position.step)
        self.state, metrics = step_function(self.state, frozen, batch, activations, *scalars)
        position.step += 1
        position.phase_step += 1
        position.done_flops += self.plan.step_flops[position.phase]
        self._read_pending(phase)  # the step before is done or nearly so: reading it now never idles the device
        self._pending = (position.phase_step, metrics)
        if self._clock.is_first:  # it may have compiled, which is no measure of speed
            read_metrics(*self._pending)
            self._clock.restart(position.phase_step)
            self.progress.start_clock(self.plan.step_flops[position.phase])

    def _pause(self, phase: Phase, signature: Signature, frozen: Params) -> None:
        """Between two steps: evaluates and saves where it is time for it, and answers a signal."""
        self.folder.check()
        evaluates, saves = self._is_due(self.config.evaluation.every_steps, phase), self._snapshot_is_due(phase)
        if evaluates or saves:
            self._read_pending(phase)  # waits for the step, so that its time is counted as its own
            with self.progress.untimed():
                if evaluates:
                    values = self._evaluate(phase, signature, frozen)
                    self.writer.write("held_out", self.position.step, {"phase": phase.name, **values})
                if saves:  # after everything that a continued run does not come by again
                    require_finite(self.state, self._where())
                    self._save(required=False)
        self._signals.poll(together=self._is_due(self.config.logging.every_steps, phase))

    def _read_pending(self, phase: Phase) -> None:
        """Reads the metrics of the last step, and logs them where it is time for it."""
        if self._pending is None:
            return
        (done, _), values = self._pending, read_metrics(*self._pending)
        self._pending = None
        if done % self.config.logging.every_steps == 0 or done == phase.steps:
            self._log(phase, done, values)

    def _log(self, phase: Phase, done: int, values: dict[str, float]) -> None:
        clock = self._clock
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
        sums = []
        for batch, activations in self.inputs.held_out_batches(phase):
            self._signals.poll()
            sums.append(evaluate(self.state.params, frozen, batch, activations))
        total, weight = (float(sum(column)) for column in zip(*sums, strict=True))
        result = {"loss": total / max(weight, 1.0)}
        if not math.isfinite(total):
            raise UserError(f"held-out loss={total} in phase {phase.name} after {self.position.step} steps; {TRY}")
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
            newest = phase.live_stacks[-1]
            self.references["taps"][str(newest)] = self._write_tap(newest, params["head"])
        for name in ("embedding", "head"):
            if name in phase.settles:
                self._freeze(name, name, name, params.pop(name))
                optimizer.pop(name)
        self.state = TrainState(params, optimizer, state.scaling)

    def _write_tap(self, stack: int, head: Params) -> str:
        """The head as it is after a stack, so that the rack can be read at that depth."""
        part = make_part(f"tap-{stack:04d}", to_host(head))
        self._unsaved.append(part)
        return part.reference

    def _freeze(self, kind: str, name: str, item: str, tree: Params) -> None:
        part = make_part(item, to_host(tree))
        self._unsaved.append(part)
        self.references[kind][name] = part.reference
        self.frozen.keep(kind, name, part.tree, part.digest)

    def _is_due(self, every: int | None, phase: Phase) -> bool:
        """Every so many steps inside a phase; its last step is the boundary's business."""
        step = self.position.phase_step
        return every is not None and step % every == 0 and 0 < step < phase.steps

    def _snapshot_is_due(self, phase: Phase) -> bool:
        if self.folder.newest == step_name(self.position.step, self.position.phase):
            return False  # just restored
        late = time.monotonic() - self._saved_at > 60 * self.config.checkpoint.every_minutes
        if processes.are_several():  # their clocks differ; asking the first one waits for the step, so it is seldom
            late = self._is_due(self.config.logging.every_steps, phase) and processes.agreed(late)
        return self._is_due(self.config.checkpoint.every_steps, phase) or (
            late and self.position.phase_step < phase.steps
        )

    def _save(self, *, required: bool) -> None:
        """Takes a copy of the state and has it written while training goes on."""
        position, references = copy.deepcopy((dataclasses.asdict(self.position), self.references))
        self.folder.save(
            self.position.step,
            self.position.phase,
            to_host(self.state),
            {"position": position, "parts": references},
            self._unsaved,
            keep=self.config.checkpoint.keep,
            required=required,
        )
        self._unsaved = []
        self._saved_at = time.monotonic()

    def _begin(self, say: Callable[[str], None]) -> None:
        """Starts from the newest sound snapshot, or from the seed where there is none."""
        tokenizer = self.corpus.tokenizer
        text = describe(self.plan)

        def note() -> None:
            self.folder.require_text(self.corpus.digest, tokenizer.model, tokenizer.digest)
            write_text(self.folder.path / "plan.txt", text + "\n")

        processes.first_alone(note)
        say(text)
        snapshot = self.folder.restore()
        if snapshot is None:
            phase, signature = self.plan.phases[0], self.plan.signatures[0]
            self.state = fresh_lasting_parts(self.config, self.program.key, phase, signature)
            return
        self.position, self.references = Position(**snapshot.meta["position"]), snapshot.meta["parts"]
        self.frozen = snapshot.frozen
        if snapshot.state is not None:
            self.state = self.program.placement.to_weights(snapshot.state)
        say(f"continuing {self.folder.path} after {self._where()}")


def _no_references() -> dict[str, dict[str, str]]:
    return {"embedding": {}, "stacks": {}, "head": {}, "taps": {}}
