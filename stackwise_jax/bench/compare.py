"""Ways of training one model at equal FLOPs, one after another, each in a process of its own, as one table.

The rows and their learning rates are those of configs/comparison.py; ROW@RATE is a row at another rate, ROW#SEED of
another seed, and --learning_rates tries every row at each. --jobs rows run at once, in turn on the GPUs that there are.
A row that failed is told so and the others go on; the same command again keeps the rows that are done and continues the
others:
python -m stackwise_jax.bench compare --rows=end_to_end,layerwise --set=data.prepared=corpora/web --workdir=runs/compare
"""

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from absl import flags

from stackwise_jax import config as config_lib
from stackwise_jax.bench.compare_plot import plot
from stackwise_jax.bench.compare_row import RESULT
from stackwise_jax.errors import UserError, did_you_mean
from stackwise_jax.overrides import apply_overrides
from stackwise_jax.schema import RunConfig

REFERENCE = "end_to_end"  # the row whose tokens set the FLOPs of all
TOLERANCE = 0.005  # of the FLOPs, between rows
ROW_COMMAND = [sys.executable, "-m", "stackwise_jax.bench.compare_row"]


def make_options() -> flags.FlagValues:
    """The flags of this benchmark."""
    options = flags.FlagValues()
    flags.DEFINE_string("config", "configs/comparison.py", "The file that has the rows.", flag_values=options)
    flags.DEFINE_list("rows", [], "Rows, each ROW or ROW@RATE; empty: all.", flag_values=options)
    flags.DEFINE_list("learning_rates", [], "Rates that every row is tried at; empty: its own.", flag_values=options)
    flags.DEFINE_integer("tokens", None, f"That {REFERENCE} sees; by default the file's.", 1, flag_values=options)
    flags.DEFINE_multi_string("set", [], "A config field of all rows: --set=data.prepared=F.", flag_values=options)
    flags.DEFINE_string("workdir", "runs/comparison", "Run folders and the table.", flag_values=options)
    flags.DEFINE_integer("minutes", 60, "Until a row is given up.", lower_bound=1, flag_values=options)
    flags.DEFINE_integer("jobs", 1, "Rows that run at once.", lower_bound=1, flag_values=options)
    flags.DEFINE_bool("plot", False, "Also draw the table, as comparison.svg.", flag_values=options)
    flags.DEFINE_bool("plan", False, "Print what every row will do and its FLOPs, then stop.", flag_values=options)
    return options


def main(options: Any) -> None:
    """Runs every row and prints the table; it is written after every row, as comparison.md and comparison.json."""
    source = load_rows(Path(options.config))
    names = row_names(source, options.rows, options.learning_rates)
    reference = make_row(source, REFERENCE, options.set)
    rows = None
    if not options.plan:
        from stackwise_jax.data.corpus import prepare_corpus  # here, so that no row waits for it

        rows = prepare_corpus(reference, report=lambda line: print(line, flush=True)).train.n_rows
    configs = equal_configs(source, names, options, rows)
    print(plan_text(configs, rows), flush=True)
    if options.plan:
        return
    workdir = Path(options.workdir).expanduser()
    workdir.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}

    slots: SimpleQueue[int] = SimpleQueue()
    for slot in range(options.jobs):
        slots.put(slot)

    def run(name: str) -> tuple[str, dict[str, Any]]:
        print(f"{name} ...", flush=True)
        slot = slots.get()
        try:
            return name, run_row(configs[name], workdir / name, timeout_seconds=60 * options.minutes, device=slot)
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(options.jobs) as pool:
        for done in as_completed([pool.submit(run, name) for name in configs]):
            name, row = done.result()
            found[name] = row
            ordered = {name: found[name] for name in configs if name in found}
            (workdir / "comparison.md").write_text(table(ordered) + "\n", encoding="utf-8")
            (workdir / "comparison.json").write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")
            print(table({name: row}).splitlines()[2], flush=True)
    ordered = {name: found[name] for name in configs}
    if options.plot:
        plot(ordered, workdir / "comparison.svg")
    print(f"\n{table(ordered)}\n\nwritten to {workdir}/comparison.md and comparison.json")


def load_rows(path: Path) -> dict[str, Any]:
    """What the file of the rows defines: get_config(row), NAMES, TOKENS, EMBEDDING_SHARE, FUSION_SHARE.

    Raises:
      UserError: no such file, or it does not define them.
    """
    if not path.is_file():
        raise UserError(f"--config={path}: no such file; run it where the repository is, or give the file's place")
    source = runpy.run_path(str(path))
    for name in ("get_config", "NAMES", "TOKENS", "EMBEDDING_SHARE", "FUSION_SHARE"):
        if name not in source:
            raise UserError(f"--config={path} must define {name}, as configs/comparison.py does")
    return source


def row_names(source: dict[str, Any], rows: list[str], learning_rates: list[str]) -> list[str]:
    """Every row at every learning rate; UserError for an unknown row or a rate that is no number."""
    for row in rows:
        name, known = re.split("[@#]", row)[0], source["NAMES"]
        if name not in known:
            raise UserError(f"--rows={row} must be among: {', '.join(known)}.{did_you_mean(name, known)}")
        if "@" in row and learning_rates:
            raise UserError(f"--rows={row} has a learning rate already; leave --learning_rates out")
    for rate in learning_rates:
        try:
            float(rate)
        except ValueError:
            raise UserError(
                f"--learning_rates={rate} must be numbers, for example --learning_rates=1e-3,2e-3"
            ) from None
    rows = rows or list(source["NAMES"])
    return [f"{row}@{rate}" for row in rows for rate in learning_rates] if learning_rates else rows


def make_row(source: dict[str, Any], name: str, overrides: list[str]) -> RunConfig:
    """The config of a row as its file has it, with overrides."""
    entries = source["get_config"](name)
    apply_overrides(entries, overrides)
    return config_lib.resolve(entries)


def equal_configs(source: dict[str, Any], names: list[str], options: Any, rows: int | None) -> dict[str, RunConfig]:
    """Every row with budgets that come to the FLOPs of the reference on as many tokens as are asked for.

    Raises:
      UserError: a row cannot come within `TOLERANCE` of them.
    """
    from stackwise_jax.bench.equal_flops import share_out, training_flops

    tokens = options.tokens or source["TOKENS"]
    reference = make_row(source, REFERENCE, [*options.set, f"training.phase_budget={tokens} tokens"])
    flops = training_flops(reference, rows)
    configs = {}
    for name in names:
        row = make_row(source, name, options.set)
        embedding, fusion = source["EMBEDDING_SHARE"], source["FUSION_SHARE"]
        configs[name] = share_out(row, flops, embedding, rows, fusion_share=fusion)
        off = training_flops(configs[name], rows) / flops - 1
        if abs(off) > TOLERANCE:
            raise UserError(
                f"{name} is {off:+.1%} off the FLOPs of {REFERENCE}, and up to {TOLERANCE:.1%} counts as equal; "
                f"give more tokens than --tokens={tokens}"
            )
    return configs


def plan_text(configs: dict[str, RunConfig], rows: int | None) -> str:
    """What every row will do: FLOPs, of them in cache passes, steps, tokens, cached bytes."""
    from stackwise_jax.memory.budget import readable_bytes, readable_count
    from stackwise_jax.train.plan import make_plan

    lines = [f"{'row':<30}{'FLOPs':>9}{'passes':>8}{'phases':>8}{'steps':>8}{'tokens':>9}{'cache':>11}  budgets"]
    for name, config in configs.items():
        plan = make_plan(config, rows)
        steps = sum(phase.steps for phase in plan.phases)
        tokens = readable_count(steps * plan.tokens_per_step)
        budgets = ", ".join(f"{phase.name} {phase.steps}" for phase in {plan.phases[0]: 0, plan.phases[-1]: 0})
        lines.append(
            f"{name:<30}{readable_count(plan.flops):>9}{sum(plan.pass_flops) / plan.flops:>8.1%}{len(plan.phases):>8}"
            f"{steps:>8}{tokens:>9}{readable_bytes(plan.cache_bytes):>11}  {budgets}"
        )
    return "\n".join(lines)


def run_row(
    config: RunConfig,
    folder: Path,
    *,
    timeout_seconds: int | float,
    command: list[str] | None = None,
    device: int = 0,
) -> dict[str, Any]:
    """The result of a row: kept where it is there already, else from a process of its own.

    Args:
      command: what is started with the config as JSON and the run folder; None: `compare_row`.
      device: which GPU it sees, counted round those that there are.

    Returns:
      what `compare_row.run_row` returns, or {"failed": why, in one line}.
    """
    result = folder / RESULT
    wanted = json.loads(config_lib.to_json(config))
    if result.is_file():
        found = json.loads(result.read_text(encoding="utf-8"))
        if found["config"] == wanted:
            return found
    try:
        done = subprocess.run(
            [*(command or ROW_COMMAND), json.dumps(wanted), str(folder)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=timeout_seconds, check=False,
            env={**os.environ, **_one_gpu(device)},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {timeout_seconds:.0f} s; the same command again continues it"}
    if done.returncode == 0 and result.is_file():
        return json.loads(result.read_text(encoding="utf-8"))
    print(done.stderr[-4000:], file=sys.stderr)
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return {"failed": lines[-1] if lines else f"it ended with exit code {done.returncode} and no word"}


def _one_gpu(device: int) -> dict[str, str]:
    """What lets a process see one of several NVIDIA GPUs alone; nothing where there are none, or one."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = wanted.split(",") if wanted else [path.name[6:] for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]
    return {"CUDA_VISIBLE_DEVICES": gpus[device % len(gpus)]} if len(gpus) > 1 else {}


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "learning rate": lambda row: f"{row['config']['optimizer']['learning_rate']:g}",
    "nats/token": lambda row: f"{row['final']['loss']:.4f}",
    "bits/byte": lambda row: f"{row['final']['bits_per_byte']:.4f}",
    "steps": lambda row: f"{row['steps']}",
    "tokens": lambda row: f"{row['tokens'] / 1e6:.1f}M",
    "PFLOPs": lambda row: f"{row['flops'] / 1e15:.2f}",
    "tokens/s": lambda row: by_kind(row, "tokens_per_second", "{:.0f}"),
    "MFU": lambda row: by_kind(row, "mfu", "{:.1%}"),
    "block state": lambda row: f"{row['block_state_bytes'] / 2**30:.2f} GiB",
    "peak memory": lambda row: f"{row['peak_bytes'] / 2**30:.1f} GiB" if row["peak_bytes"] else "-",
    "wall s": lambda row: f"{row['wall_seconds']:.0f}",
}


def by_kind(row: dict[str, Any], figure: str, form: str) -> str:
    """A figure of every kind of phase: "embedding 9, stack 5"; of one kind its figure alone; a dash: unknown."""
    values = {kind: form.format(of[figure]) for kind, of in row["phases"].items() if figure in of}
    if len(values) == 1:
        return next(iter(values.values()))
    return ", ".join(f"{kind} {value}" for kind, value in values.items()) or "-"


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: a line a row, then for rows of several phases the loss after each."""
    lines = ["| row | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in found.items():
        cells = [row["failed"].replace("|", "/")] if "failed" in row else [cell(row) for cell in COLUMNS.values()]
        label = f"{name}, failed" if "failed" in row else name
        lines.append(" | ".join([f"| {label}", *cells]) + " |")
    return "\n".join([*lines, *depth_lines(found)])


def depth_lines(found: dict[str, dict[str, Any]]) -> list[str]:
    """Held-out nats a token after every phase of the rows that have several."""
    several = {name: row["held_out"] for name, row in found.items() if len(row.get("held_out", ())) > 1}
    if not several:
        return []
    losses = [
        f"- {name}: " + ", ".join(f"{of['loss']:.4f}" for of in phases.values()) for name, phases in several.items()
    ]
    return ["", "Held-out nats a token after every phase:", "", *losses]
