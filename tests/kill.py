"""Kills small runs at random moments, starts them again, and compares what comes out with a run that nothing stopped.

    python tests/kill.py --kills=40 --terms=20 --seed=0 [--workdir=FOLDER]

A SIGKILL comes at a time uniform over what is left of the run, or, for moments that are rare, as soon as the run is
inside one. A SIGTERM, SIGINT or SIGUSR1 must end in exit code 75 and lose no step. Every run is started again until it
ends, and its frozen parts, held-out figures and metrics must be those of the undisturbed run, bit for bit. The child
process marks in a file what it is doing, and does it slowly enough to be caught. Exit code 0: everything held.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

EXIT_STOPPED = 75
KILLS_A_RUN = 5  # then it may end, and is compared
# At least so many kills inside each; the rest fall where they fall.
WANTED = {
    "writing": 6, "advancing": 4, "filling": 2, "evaluating": 2, "restoring": 2, "removing": 1,
    "embedding": 2, "stack": 2, "end_to_end": 2,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "cached": {"cache.tier": "disk"},
    "uncached": {"training.progressive.cache_activations": False},
    "end_to_end": {"training.mode": "end_to_end", "training.phase_budget": "24 steps"},
}


# --- the child: one run, marked and slowed ---


def make_config(name: str, root: Path) -> Any:
    """A small run with snapshots and evaluations inside every phase."""
    from stackwise_jax import config as config_lib

    entries = config_lib.default()
    entries.model.update({"vocab_size": 400, "d_model": 32, "n_heads": 4, "d_ff": 48})
    entries.model.architecture.n_stacks = 3
    entries.data.update({"max_bytes": 300_000, "max_rows": 240, "seq_len": 32, "cache_dir": str(root / "data")})
    entries.training.update({"batch_size": 4, "phase_budget": "7 steps", "embedding_budget": "6 steps"})
    entries.evaluation.update({"rows": 16, "every_steps": 4})
    entries.checkpoint.every_steps = 3
    entries.logging.every_steps = 1
    entries.cache.chunk_bytes = 100_000
    entries.update_from_flattened_dict(CONFIGS[name])
    return config_lib.resolve(entries)


class Marks:
    """What the child is inside of, appended to a file line by line: "+ kind", "- kind", "done step", "resumed step"."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, text: str) -> None:
        os.write(self._file, f"{text}\n".encode())

    @contextlib.contextmanager
    def inside(self, kind: str, seconds: float) -> Iterator[None]:
        self.write(f"+ {kind}")
        time.sleep(seconds)
        yield
        self.write(f"- {kind}")


def mark_and_slow(marks: Marks) -> None:
    """Wraps what a run does; the package itself knows nothing of it."""
    from stackwise_jax.memory.activations import ActivationCache
    from stackwise_jax.train import checkpoint, folder, loop

    def wrap(owner: Any, name: str, kind_of: Callable[..., str], seconds: float) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            with marks.inside(kind_of(*args), seconds):
                return original(*args, **kwargs)

        setattr(owner, name, call)

    raise_by_one = ActivationCache._raise_by_one

    def chunks(cache: Any, trunk: Any, depth: int, numbers: Any) -> Iterator[None]:
        with marks.inside("filling" if depth < 0 else "advancing", 0.02):
            for _ in raise_by_one(cache, trunk, depth, numbers):
                time.sleep(0.02)
                yield

    ActivationCache._raise_by_one = chunks
    wrap(loop.Run, "_step", lambda run, step, phase, frozen: phase.name.partition("_0")[0], 0.03)
    step = loop.Run._step

    def counted(run: Any, *args: Any) -> None:
        step(run, *args)
        marks.write(f"done {run.position.step}")

    loop.Run._step = counted
    wrap(loop.Run, "_evaluate", lambda *_: "evaluating", 0.05)
    wrap(folder.RunFolder, "restore", lambda *_: "restoring", 0.2)
    wrap(folder, "write_folder", lambda *_: "writing", 0.05)
    wrap(folder, "_remove", lambda *_: "removing", 0.02)
    wrap(checkpoint, "write_text", lambda path, _: path.name, 0.05)
    wrap(checkpoint, "_sync", lambda _: "syncing", 0.002)


def child(name: str, root: Path, workdir: Path, marks_path: Path) -> None:
    """Trains one run to its end, as `stackwise_jax.main` does."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(root / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    from stackwise_jax.data.corpus import prepare_corpus
    from stackwise_jax.errors import one_line_errors
    from stackwise_jax.train import loop

    marks = Marks(marks_path)
    mark_and_slow(marks)
    config = make_config(name, root)
    with one_line_errors():
        corpus = prepare_corpus(config, report=lambda _: None)
        run = loop.Run(config, corpus, workdir, lambda _: None)
        marks.write(f"resumed {run.position.step}")
        run.to_end()
    marks.write("end")


# --- the parent: starts, kills, compares ---


def outcome(workdir: Path) -> str:
    """A digest of what a finished run left: frozen parts, held-out figures, and every loss that it logged."""
    from stackwise_jax.train import checkpoint
    from stackwise_jax.train.folder import committed, references

    last = committed(workdir / "steps")[-1]
    meta = checkpoint.read_meta(last)
    parts = {}
    for reference in references(meta):
        checkpoint.verify(workdir / "stacks" / reference)
        parts[reference] = json.loads((workdir / "stacks" / reference / "manifest.json").read_text())["arrays"]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [[line["kind"], line["phase"], line["step"], line["loss"]] for line in lines if "loss" in line]
    facts = [meta["step"], meta["position"], parts, losses]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass
class Child:
    """A started child and what its marks say.

    Attributes:
      done: the last step that it finished; None before its first.
      resumed: the step that it continued from; None while it restores.
      has_ended: its run has, and only the process is still to go.
      inside: what it is inside of at the moment.
    """

    process: subprocess.Popen[bytes]
    marks: Path
    done: int | None = None
    resumed: int | None = None
    has_ended: bool = False
    inside: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    offset: int = 0

    def look(self) -> bool:
        """Reads new marks; says whether the process still runs."""
        is_running = self.process.poll() is None
        content = self.marks.read_bytes()[self.offset :] if self.marks.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        self.offset += len(whole)
        for line in whole.decode().splitlines():
            word, _, value = line.partition(" ")
            if word in "+-":
                self.inside[value] += 1 if word == "+" else -1
            elif word == "done":
                self.done = int(value)
            elif word == "resumed":
                self.resumed = int(value)
            elif word == "end":
                self.has_ended = True
        return is_running

    def wait(self, reached: Callable[[], bool]) -> bool:
        """Waits until something is reached; False when the process ends before."""
        while self.look():
            if reached():
                return True
            time.sleep(0.001)
        return False

    def send(self, number: int) -> set[str]:
        """Sends a signal and waits for the end; returns what it was inside of, by the marks until its death."""
        self.look()
        before = {kind for kind, count in self.inside.items() if count > 0}
        self.process.send_signal(number)
        self.process.wait()
        self.look()
        after = {kind for kind, count in self.inside.items() if count > 0}
        return after if number == signal.SIGKILL else before


class Trial:
    """One run folder, started again and again until its run ends."""

    def __init__(self, root: Path, config: str, number: int | str) -> None:
        self.root, self.config = root, config
        self.workdir = root / "runs" / f"{config}-{number}"
        self.starts = self.kills = 0

    def start(self) -> Child:
        self.starts += 1
        marks = self.root / "marks" / f"{self.workdir.name}-{self.starts}"
        command = [sys.executable, __file__, "--child", self.config, str(self.root), str(self.workdir), str(marks)]
        log = (self.root / "marks" / f"{self.workdir.name}.log").open("ab")
        return Child(subprocess.Popen(command, stdout=log, stderr=log), marks)


class Test:
    """The whole test; `run` says whether everything held."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.draw = root, random.Random(seed)
        self.landed: collections.Counter[str] = collections.Counter()
        self.right: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.steps: dict[str, int] = {}
        self.faults: list[str] = []
        self.finished = 0
        for folder in ("runs", "marks"):
            (root / folder).mkdir(parents=True, exist_ok=True)

    def undisturbed(self) -> None:
        """Runs every config twice: the first fills the caches of data and programs, the second is timed."""
        for config in CONFIGS:
            for number in ("first", "whole"):
                trial = Trial(self.root, config, number)
                running = trial.start()
                running.wait(lambda child=running: child.done is not None)
                started = time.monotonic()
                running.wait(lambda: False)
                self.seconds[config], self.steps[config] = time.monotonic() - started, running.done or 0
                assert running.process.returncode == 0, f"see {self.root}/marks/{trial.workdir.name}.log"
            self.right[config] = outcome(trial.workdir)
            assert self.right[config] == outcome(self.root / "runs" / f"{config}-first")
            print(f"undisturbed {config}: {self.steps[config]} steps, {self.seconds[config]:.1f} s after the first")

    def compare(self, trial: Trial, running: Child) -> None:
        """Checks a run that ended by itself."""
        self.finished += 1
        if running.process.returncode and not running.has_ended:
            self.faults.append(f"{trial.workdir}: exit code {running.process.returncode}")
        elif outcome(trial.workdir) != self.right[trial.config]:
            self.faults.append(f"{trial.workdir}: another outcome")
        else:
            shutil.rmtree(trial.workdir)
            print(f"  {trial.workdir.name}: ended after {trial.starts} starts, bitwise equal", flush=True)

    def rarest(self, config: str) -> str | None:
        """A kind of moment that this config has and that is still wanted."""
        mine = {"end_to_end": {"end_to_end"}, "cached": {"embedding", "stack", "advancing", "filling"}}
        mine["uncached"] = {"embedding", "stack"}
        mine[config] |= {"writing", "evaluating", "restoring", "removing"}
        left = [kind for kind, count in WANTED.items() if kind in mine[config] and self.landed[kind] < count]
        return self.draw.choice(left) if left else None

    def moment(self, running: Child, config: str, aim: str | None) -> bool:
        """Waits for the moment to strike; False when the run ends before."""
        if aim == "restoring":
            return running.wait(lambda: running.inside["restoring"] > 0)
        if not running.wait(lambda: running.done is not None):
            return False
        if aim is not None:
            return running.wait(lambda: running.inside[aim] > 0)
        share = 1 - (running.done or 0) / self.steps[config]
        strike = time.monotonic() + self.draw.uniform(0, self.seconds[config] * share)
        return running.wait(lambda: time.monotonic() >= strike)

    def kill(self, count: int) -> None:
        """SIGKILLs: the first half uniform in time, then where kills are missing."""
        number = 0
        trial: Trial | None = None
        note = ""
        while number < count or trial is not None:
            if trial is None:
                trial = Trial(self.root, list(CONFIGS)[self.finished % len(CONFIGS)], self.finished)
            running = trial.start()
            is_last = number >= count or trial.kills >= KILLS_A_RUN
            aim = self.rarest(trial.config) if number >= count // 2 or trial.starts % 2 == 0 else None
            if aim == "restoring" and trial.starts == 1:
                aim = None
            struck = running.wait(lambda: False) if is_last else self.moment(running, trial.config, aim)
            inside: set[str] = set()
            if struck:
                time.sleep(self.draw.uniform(0, 0.05) if aim else 0)
                inside = running.send(signal.SIGKILL)
            if note:
                print(f"{note}; resumed from {running.resumed}", flush=True)
                note = ""
            if not struck or running.has_ended:
                self.compare(trial, running)
                trial = None
                continue
            number, trial.kills = number + 1, trial.kills + 1
            self.landed.update(inside or {"between"})
            step = running.done if running.done is not None else running.resumed
            how = f"aimed at {aim}" if aim else "uniform"
            note = (
                f"kill {number} {trial.workdir.name} ({how}): in {'+'.join(sorted(inside)) or 'between'}, step {step}"
            )

    def terminate(self, count: int) -> None:
        """Signals that ask to stop: exit code 75, no step lost, the same outcome."""
        number = 0
        trial: Trial | None = None
        stood: int | None = None
        while number < count or trial is not None:
            if trial is None:
                trial, stood = Trial(self.root, list(CONFIGS)[self.finished % len(CONFIGS)], self.finished), None
            running = trial.start()
            is_last = number >= count or trial.kills >= KILLS_A_RUN
            struck = running.wait(lambda: False) if is_last else self.moment(running, trial.config, None)
            name = self.draw.choice(["SIGTERM", "SIGTERM", "SIGINT", "SIGUSR1"])
            asked = time.monotonic()
            inside = running.send(signal.Signals[name]) if struck else set()
            if stood is not None and running.resumed != stood:
                self.faults.append(f"{trial.workdir}: stopped at step {stood}, continued at {running.resumed}")
            code = running.process.returncode
            if not struck or running.has_ended:
                self.compare(trial, running)
                trial = None
                continue
            number, trial.kills, stood = number + 1, trial.kills + 1, running.done
            if code != EXIT_STOPPED:
                self.faults.append(f"{trial.workdir}: exit code {code} after {name}")
            where = "+".join(sorted(inside)) or "between"
            print(
                f"signal {number} {trial.workdir.name}: {name} in {where}, exit code {code} after "
                f"{time.monotonic() - asked:.1f} s at step {stood}",
                flush=True,
            )

    def run(self, kills: int, terms: int) -> bool:
        self.undisturbed()
        self.kill(kills)
        self.terminate(terms)
        missing = {kind: count for kind, count in WANTED.items() if self.landed[kind] < count}
        print(f"{kills} kills, inside: {dict(self.landed.most_common())}")
        print(f"{terms} signals; {self.finished} runs ended; {len(self.faults)} faults")
        print("\n".join(self.faults), end="\n" if self.faults else "")
        if missing and kills >= sum(WANTED.values()):
            print(f"too few kills inside: {missing}")
            return False
        return not self.faults


def main() -> None:
    """Parses the command line and runs the test, or the child."""
    if sys.argv[1:2] == ["--child"]:
        name, root, workdir, marks = sys.argv[2:]
        child(name, Path(root), Path(workdir), Path(marks))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, default=None)
    options = parser.parse_args()
    root = options.workdir or Path(tempfile.mkdtemp(prefix="stackwise-kill-"))
    print(f"in {root}")
    held = Test(root, options.seed).run(options.kills, options.terms)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
