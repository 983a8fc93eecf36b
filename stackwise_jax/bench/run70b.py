"""A large rack trained from scratch, saved, restored and read on this machine, and every figure that it promises.

Runs `configs/llama_70b.py` through the very programs that a person runs, each in a process of its own: the bare live
step, the training, an evaluation and samples from the run folder. Prints seconds and bytes of every part, the FLOP/s of
the whole run over those of the bare step, held-out loss by depth:
python -m stackwise_jax.bench run70b --source='text/*.jsonl' --workdir=runs/llama_70b
"""

import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from stackwise_jax.errors import UserError
from stackwise_jax.memory.budget import readable_bytes
from stackwise_jax.models import families

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "llama_70b.py"


def make_options() -> flags.FlagValues:
    """The flags of this benchmark."""
    options = flags.FlagValues()
    sizes = [*families.LLAMA_SIZES]
    flags.DEFINE_enum("size", "70b", sizes, "Argument of the config.", flag_values=options)
    flags.DEFINE_string("workdir", None, "The run folder; a new one.", required=True, flag_values=options)
    flags.DEFINE_integer("stacks", None, "Stacks of the rack; the config's by default.", flag_values=options)
    flags.DEFINE_integer("rows", 368, "Training rows, all of them cached.", lower_bound=4, flag_values=options)
    flags.DEFINE_integer("steps", 29, "Updates a stack.", lower_bound=1, flag_values=options)
    flags.DEFINE_integer("embedding_steps", 120, "Updates of phase 0.", lower_bound=1, flag_values=options)
    flags.DEFINE_multi_string("set", [], "A config field: --set=precision.cache=bf16; repeatable.", flag_values=options)
    flags.DEFINE_string("source", "embedded", "Text, as data.source.", flag_values=options)
    flags.DEFINE_bool("read", True, "Also evaluate and sample the rack when it is trained.", flag_values=options)
    flags.DEFINE_string("json", "", "A file that the figures are written to.", flag_values=options)
    return options


def main(options: Any) -> None:
    """Runs everything and prints the figures of each part as soon as they are known."""
    workdir = Path(options.workdir)
    if workdir.exists():
        raise UserError(f"--workdir={workdir} exists: its first steps would not be measured; give another one")
    figures: dict[str, Any] = {}
    bare = workdir.with_name(workdir.name + ".step.json")
    _run(step_command(options, bare))
    figures["bare_step"] = json.loads(bare.read_text(encoding="utf-8"))
    started = time.monotonic()
    _run([sys.executable, "-m", "stackwise_jax.main", f"--workdir={workdir}", *config_flags(options)])
    figures["training_process_seconds"] = time.monotonic() - started
    figures |= run_figures(workdir)
    report(figures)
    if options.read:
        for name, command in reading_commands(workdir).items():
            started = time.monotonic()
            _run(command)
            figures[f"{name}_seconds"] = time.monotonic() - started
            print(f"{name}: {figures[f'{name}_seconds']:.0f} s in a process of its own")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def config_flags(options: Any) -> list[str]:
    """The run as flags of `stackwise_jax.main`."""
    fields = {
        "data.source": options.source,
        "data.max_rows": options.rows,
        "training.phase_budget": f"{options.steps} steps",
        "training.embedding_budget": f"{options.embedding_steps} steps",
        "logging.every_steps": 5,
    }
    if options.stacks:
        fields["model.architecture.n_stacks"] = options.stacks
    named = [f"--config.{name}={value}" for name, value in fields.items()]
    return [f"--config={CONFIG}:{options.size}", *named, *(f"--config.{change}" for change in options.set)]


def step_command(options: Any, path: Path) -> list[str]:
    """The bare step of the run's second stack, its head included."""
    changes = [f"--set={change}" for change in options.set if not change.startswith(("data.prepared", "data.source"))]
    command = [sys.executable, "-m", "stackwise_jax.bench", "block", "--notorch", "--head", "--rows=fp8"]
    return [*command, f"--size={options.size}", f"--json={path}", "--set=training.loss_fraction=0.25", *changes]


def reading_commands(workdir: Path) -> dict[str, list[str]]:
    """What reads the finished rack."""
    python = [sys.executable, "-m"]
    return {
        "evaluation": [*python, "stackwise_jax.evaluate", f"--workdir={workdir}", "--rows=8"],
        "samples": [*python, "stackwise_jax.generate", f"--workdir={workdir}", "--tokens=48", "--samples=2"],
    }


def _run(command: Sequence[str]) -> None:
    """Runs a program, its output under ours.

    Raises:
      UserError: it failed; it has said why.
    """
    code = subprocess.run(command, check=False).returncode
    if code:
        raise UserError(f"{' '.join(command[1:4])} ended with exit status {code}; its last lines above say why")


def run_figures(workdir: Path) -> dict[str, Any]:
    """What the run's own records say of a growing run.

    Returns:
      held_out: loss by phase; phases: seconds of the parts of each; visit_ratio: seconds a token-visit in the last
      stack over the second; device_peak_bytes, host_peak_bytes: of the process; rack_bytes: on the disk.
    """
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    phases = {line["phase"]: line for line in lines if line["kind"] == "phase"}
    names = [name for name in phases if name.startswith("stack")]
    timed = [line for line in lines if line["kind"] == "train" and "tokens_per_second" in line]  # not a first step
    rates = {name: [line["tokens_per_second"] for line in timed if line["phase"] == name] for name in names}
    visits = {name: 1.0 / statistics.median(of) for name, of in rates.items() if of}
    last = phases[names[-1]]
    return {
        "held_out": {line["phase"]: line["loss"] for line in lines if line["kind"] == "held_out"},
        "phases": phases,
        "visit_ratio": visits[names[-1]] / visits[names[1]] if len(visits) == len(names) > 2 else None,
        "device_peak_bytes": last.get("device_peak_bytes"),
        "host_peak_bytes": last.get("host_peak_bytes"),
        "rack_bytes": sum(file.stat().st_size for file in (workdir / "stacks").rglob("*") if file.is_file()),
        "plan": (workdir / "plan.txt").read_text(encoding="utf-8"),
        "flops": run_flops(workdir),
    }


def run_flops(workdir: Path) -> dict[str, float]:
    """FLOPs of the run by its plan: of the phases of stacks, and of the passes of the cache between these."""
    from stackwise_jax.config import from_json
    from stackwise_jax.train.plan import make_plan

    plan = make_plan(from_json(workdir / "config.json"), None)
    stacks = [index for index, phase in enumerate(plan.phases) if phase.cached]
    return {
        "steps": float(sum(plan.phases[index].steps * plan.step_flops[index] for index in stacks)),
        "passes": float(sum(plan.pass_flops[index] for index in stacks)),
    }


def report(figures: dict[str, Any]) -> None:
    """Prints the figures of the training."""
    held_out, phases = figures["held_out"], figures["phases"]
    names = [name for name in phases if name.startswith("stack")]
    rises = [held_out[after] - held_out[before] for before, after in itertools.pairwise(names)]
    # The first stack's phase compiles and touches the pinned memory for the first time: apart.
    parts = ("cache", "train", "evaluate", "settle")
    first = sum(phases[names[0]][f"{part}_seconds"] for part in parts)
    spent = {part: sum(phases[name][f"{part}_seconds"] for name in names[1:]) for part in parts}
    seconds, share = sum(spent.values()), (len(names) - 1) / len(names)
    flops = (figures["flops"]["steps"] + figures["flops"]["passes"]) * share
    with_head = next(row for row in figures["bare_step"] if row["name"].endswith("with head"))
    bare = with_head["flops"] / with_head["step_seconds"]
    print(f"held out: {held_out[names[0]]:.4f} after the first stack, {held_out[names[-1]]:.4f} after the last")
    print(f"largest rise from one stack to the next: {max(rises, default=0.0):+.4f} nats")
    print(f"first stack, with compilation and first touch of pinned memory: {first:.1f} s")
    print(f"other stacks: {seconds:.1f} s, " + ", ".join(f"{name} {of:.1f} s" for name, of in spent.items()))
    print(f"executed: {flops / seconds / 1e12:.1f} TFLOP/s, {100 * flops / seconds / bare:.1f} % of the bare step's")
    if figures["visit_ratio"]:
        print(f"a token-visit of the last stack over one of the second: {figures['visit_ratio']:.3f}")
    if figures["device_peak_bytes"]:
        print(f"device memory, lifetime peak: {readable_bytes(figures['device_peak_bytes'])}")
    if figures["host_peak_bytes"]:
        print(f"host memory, lifetime peak, cache included: {readable_bytes(figures['host_peak_bytes'])}")
    print(f"rack on the disk: {figures['rack_bytes'] / 1e9:.2f} GB")
