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

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from stackwise_jax.data.corpus import Corpus
from stackwise_jax.data.pipeline import make_batches
from stackwise_jax.errors import StoppedError, UserError, is_out_of_memory
from stackwise_jax.memory import processes
from stackwise_jax.memory.placement import to_host
from stackwise_jax.memory.precision import from_storage, to_storage
from stackwise_jax.models.adapters import merge
from stackwise_jax.objectives.objective import Task
from stackwise_jax.schema import RunConfig
from stackwise_jax.train.branches import BranchRun, Compiled, held_out_figures
from stackwise_jax.train.checkpoint import write_text
from stackwise_jax.train.describe import describe
from stackwise_jax.train.folder import Part, make_part, step_name
from stackwise_jax.train.health import TRY, explain_memory, read_metrics, require_finite
from stackwise_jax.train.metrics import (
    MetricsWriter,
    PhaseClock,
    Progress,
    Stopwatch,
    memory_figures,
    peak_flops,
    readable_time,
)
from stackwise_jax.train.optimizer import schedule_fraction
from stackwise_jax.train.phases import Phase, Role, Signature
from stackwise_jax.train.plan import make_plan
from stackwise_jax.train.position import Position, Result, no_references
from stackwise_jax.train.program import make_program
from stackwise_jax.train.scaling import init_scaling
from stackwise_jax.train.signals import StopSignals
from stackwise_jax.train.sources import given_parts
from stackwise_jax.train.state import (
    Frozen,
    PartSource,
    TrainState,
    adapter_name,
    carried_names,
    joined,
    part_names,
    split,
    untie_head,
)
from stackwise_jax.train.trained import tap_folders
from stackwise_jax.train.trunk import TrunkInputs, cache_tier, make_cache_store, shard_folder
from stackwise_jax.train.watched import open_folder
from stackwise_jax.types import Params


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
        in_fp8 = config.training.progressive.new_stack_precision == "fp8"
        peak = peak_flops(config.logging.peak_flops, config.mesh.n_devices, in_fp8=in_fp8)
        self.progress = Progress(total_flops=self.plan.flops, peak=peak)
        shards = shard_folder(config, workdir)
        self._tier = cache_tier(self.plan, shards)
        make_store = functools.partial(make_cache_store, self.plan, self._tier, shards, self._warn)
        self.inputs = TrunkInputs(self.program, corpus, order, make_store)
        self.folder = open_folder(workdir, config, say=self._warn)  # only after everything that may refuse the run
        self.position, self.frozen, self.references = Position(), Frozen(), no_references()
        self.state = TrainState({}, {}, init_scaling(config))
        self._source = PartSource(config, self.program.key)
        self._compiled = Compiled(self.program)
        self._bytes: dict[Task, int] = {}
        self._signals = StopSignals()
        self._clock = PhaseClock(0)
        self._pending: tuple[int, dict[str, Array]] | None = None  # metrics of the last step, not read yet
        self._order = np.zeros(0, np.int64)  # of the branches of the phase
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
        taps = tap_folders(self.folder.path, self.references["taps"])
        return Result(self.plan, self.frozen, self.position.held_out, taps)

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

    def _run_phase(self, phase: Phase, signatures: tuple[Signature, ...]) -> None:
        watch = Stopwatch()
        if self.position.phase_step == 0:
            self._begin_phase(phase, signatures[0])
        if self._tier == "disk":
            self.folder.flush()  # a cache that outlives this process must not get ahead of what the folder holds
        self.inputs.prepare(phase, self.frozen, self.position.step, self._note, self._live_stack)
        watch.lap("cache")
        branches = [
            BranchRun(self._compiled, self.inputs, self.frozen, phase, branch, signature)
            for branch, signature in zip(phase.branches, signatures, strict=True)
        ]
        self._train(phase, branches)
        watch.lap("train")
        result = self._evaluate(phase, branches)
        watch.lap("evaluate")
        self.position.held_out[phase.name] = result
        self.writer.write("held_out", self.position.step, {"phase": phase.name, **result})
        figures = ", ".join(f"{name} {value:.4f}" for name, value in result.items())
        self.progress.say(f"{phase.name}: held-out {figures} ({readable_time(watch.seconds['train'])})")
        require_finite(self.state, self._where())
        self._settle(phase)
        self.position.done_flops += self.plan.pass_flops[self.position.phase]
        self.progress.count(self.plan.pass_flops[self.position.phase])
        self.position.phase, self.position.phase_step = self.position.phase + 1, 0
        self._save(required=True)
        watch.lap("settle")
        self.writer.write("phase", self.position.step, {"phase": phase.name, **watch.figures(), **memory_figures()})

    def _begin_phase(self, phase: Phase, signature: Signature) -> None:
        """Completes the live state with what the phase before did not train."""
        carried = split(self.state, carried_names(self.plan.phases, self.position.phase))
        parts = self._source.begin(phase, carried, self.frozen, head_has_table=signature.head_has_table)
        self.references["shelves"] = {
            name: reference for name, reference in self.references["shelves"].items() if name in self.frozen.shelves
        }
        self.state = joined(parts, part_names(phase), self.state.scaling)

    def _live_stack(self, stack: int) -> Params | None:
        """The weights of a stack that the phase trains; None: it does not."""
        live = self.plan.phases[self.position.phase].live_stacks
        return self.state.params["stacks"][live.index(stack)] if stack in live else None

    def _train(self, phase: Phase, branches: list[BranchRun]) -> None:
        self._order = phase.branch_order()
        self._clock = PhaseClock(self.position.phase_step)
        self._pause(phase, branches)  # a signal may have come in the middle of the last step's evaluation
        while self.position.phase_step < phase.steps:
            self._step(phase, branches[self._order[self.position.phase_step]])
            self._pause(phase, branches)
        self._read_pending(phase)

    def _step(self, phase: Phase, branch: BranchRun) -> None:
        position = self.position
        waited = time.perf_counter()
        batch = next(self.batches)
        self._clock.data_seconds += time.perf_counter() - waited
        scalars = self.program.placement.to_small(self._fractions(phase, branch), np.int32(position.step))
        batch, activations = self.inputs.training_batch(branch.branch, batch, position.step)
        self.state, metrics = branch.update(self.state, batch, activations, scalars)
        position.step += 1
        position.phase_step += 1
        position.done_flops += self.plan.step_flops[position.phase]
        self._read_pending(phase)  # the step before is done or nearly so: reading it now never idles the device
        self._pending = (position.phase_step, metrics)
        if self._clock.is_first:  # it may have compiled, which is no measure of speed
            read_metrics(*self._pending)
            self._clock.restart(position.phase_step)
            self.progress.start_clock(self.plan.step_flops[position.phase])

    def _fractions(self, phase: Phase, branch: BranchRun) -> np.ndarray:
        """What the learning rate of each part that the branch trains is multiplied by."""
        first, steps = phase.schedule or (0, phase.steps)
        fraction = schedule_fraction(self.config.optimizer, first + self.position.phase_step, steps)
        return np.array([fraction * phase.rate(name) for name in branch.rate_names], np.float32)

    def _pause(self, phase: Phase, branches: list[BranchRun]) -> None:
        """Between two steps: evaluates and saves where it is time for it, and answers a signal."""
        self.folder.check()
        evaluates, saves = self._is_due(self.config.evaluation.every_steps, phase), self._snapshot_is_due(phase)
        if evaluates or saves:
            self._read_pending(phase)  # waits for the step, so that its time is counted as its own
            with self.progress.untimed():
                if evaluates:
                    values = self._evaluate(phase, branches)
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
        self._clock.losses[phase.branch_names[self._order[done - 1]]] = values["loss"]
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
        if len(phase.branches) > 1:  # which take turns: the last update's loss is of one of them
            values |= {f"loss_{name}": loss for name, loss in clock.losses.items()}
        self.writer.write("train", step, {"phase": phase.name, "phase_step": done, **values, **rates})
        self.progress.show(phase.name, done, phase.steps, clock.losses, rates)

    def _evaluate(self, phase: Phase, branches: list[BranchRun]) -> dict[str, float]:
        """Held-out loss of the paths as they stand, in nats per token that is asked for; see `held_out_figures`."""
        measured = [branches[number] for number in phase.measured]
        sums = [own.held_out(self.state, self._signals.poll) for own in measured]
        for total, _ in sums:
            if not math.isfinite(total):
                raise UserError(f"held-out loss={total} in phase {phase.name} after {self.position.step} steps; {TRY}")
        return held_out_figures([own.branch for own in measured], sums, self._held_out_bytes)

    def _held_out_bytes(self, task: Task) -> int:
        """Bytes of the text that the held-out loss of a task asks for."""
        if task not in self._bytes:
            examples = (self.program.corrupt(task, batch) for batch in self.inputs.held_out)
            count = self.corpus.tokenizer.scored_bytes
            self._bytes[task] = sum(count(np.asarray(own.targets), np.asarray(own.weights)) for own in examples)
        return self._bytes[task]

    # State: beginning, settling, saving, restoring.

    def _settle(self, phase: Phase) -> None:
        """Writes a frozen copy of what settles, lays aside what is trained again later, and lets the rest go."""
        parts = split(self.state, part_names(phase))
        if phase.unties_head:
            parts = untie_head(self.config, parts)
        for name in phase.settles:
            params, moments = parts[name]
            if name in phase.shelves:
                self._freeze("shelves", str(name), f"shelf-{name}", {"params": params, "optimizer": moments})
            if isinstance(name, int):
                self._freeze("stacks", str(name), f"{name:04d}", to_storage(params, self.config.precision.trunk))
            else:
                self._freeze(name, name, name, params)
        kept = carried_names(self.plan.phases, self.position.phase + 1) if not self._is_last(phase) else ()
        for stack in phase.adapter_stacks:
            if adapter_name(stack) not in kept:
                self._settle_adapter(stack, parts[adapter_name(stack)][0])
        newest = phase.newest
        if newest is not None and phase.main.head is Role.LIVE and "head" not in phase.settles:
            self.references["taps"][str(newest)] = self._write_tap(newest, parts["head"][0])
        self.state = joined(parts, kept, self.state.scaling)

    def _is_last(self, phase: Phase) -> bool:
        return phase is self.plan.phases[-1]

    def _settle_adapter(self, stack: int, adapter: Params) -> None:
        """An adapter is a part of its own, or is added into its stack for good."""
        adapters = self.config.training.adapters
        if not adapters.merge:
            self._freeze("adapters", str(stack), f"adapter-{stack:04d}", adapter)
            return
        base = from_storage(self.frozen.stacks[stack], jnp.float32)
        merged = merge(base, adapter, adapters.alpha)
        self._freeze("stacks", str(stack), f"{stack:04d}", to_storage(merged, self.config.precision.trunk))

    def _write_tap(self, stack: int, head: Params) -> str:
        """The head as it is after a stack, so that the rack can be read at that depth."""
        part = make_part(f"tap-{stack:04d}", to_host(head))
        self._unsaved.append(part)
        return part.reference

    def _freeze(self, kind: str, name: str, item: str, tree: Params) -> None:
        part = make_part(item, to_host(tree))
        self._unsaved.append(part)
        self.references[kind][name] = part.reference
        self.frozen.keep(kind, name, part.tree, part.digest, self.folder.reader(part))

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
        parts, self._unsaved = self._unsaved, []
        self.folder.save(
            self.position.step,
            self.position.phase,
            to_host(self.state),
            {"position": position, "parts": references},
            parts,
            keep=self.config.checkpoint.keep,
            required=required,
        )
        self._saved_at = time.monotonic()
        if processes.are_several():
            return  # only the process that writes knows what is on the disk
        under_way = {part.reference for part in parts}  # all that was handed over before is there by now
        unwritten = [int(stack) for stack, own in self.references["stacks"].items() if own in under_way]
        self.frozen.stacks.release(self.config.checkpoint.host_gib * 2**30, unwritten=unwritten)

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
            for kind, name, tree in given_parts(self.config, tokenizer, say):
                self._freeze(kind, name, f"{int(name):04d}" if kind == "stacks" else name, tree)
            if self._unsaved:
                self._save(required=True)
            return
        self.position, self.references = Position(**snapshot.meta["position"]), snapshot.meta["parts"]
        self.frozen = snapshot.frozen
        if snapshot.state is not None:
            self.state = self.program.placement.to_weights(snapshot.state)
        say(f"continuing {self.folder.path} after {self._where()}")
