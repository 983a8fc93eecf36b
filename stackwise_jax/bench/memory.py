"""The plan's device memory against what the device's allocator held, for pairs of a model and a way of training it.

Every pair is a short run of the ordinary loop on random tokens (two updates a phase, the first compiled), in a process
of its own, since an allocator's peak is that of its process; it covers initialisation, filling and advancing the cache,
training, evaluating and settling. Pairs are small enough for a card of 24 GB, but for those of the 70B width. On a CPU,
which has no memory of its own, --compiled compares the train steps with the compiler's count instead:
python -m stackwise_jax.bench memory --pairs=all
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from absl import flags

from stackwise_jax import config as config_lib
from stackwise_jax.errors import UserError, did_you_mean
from stackwise_jax.memory.budget import readable_bytes
from stackwise_jax.models import families
from stackwise_jax.overrides import apply_overrides
from stackwise_jax.schema import RunConfig

ROW_COMMAND = [sys.executable, "-m", "stackwise_jax.bench.memory_row"]

_GROWN = ["training.mode=layerwise", "training.head=frozen"]
_MASKED = ["model.attention=bidirectional", "objective.mask_variants=1"]
_NARROW = ["precision.optimizer=int8", "precision.weights=bf16"]
PAIRS: dict[str, list[str]] = {
    "end_to_end": ["training.mode=end_to_end"],
    "remat_dots": ["training.mode=end_to_end", "training.remat=dots"],
    "remat_full": ["training.mode=end_to_end", "training.remat=full"],
    "accumulated": ["training.mode=end_to_end", "training.accumulation_steps=4"],
    "int8_moments": ["training.mode=end_to_end", *_NARROW],
    "bf16_moments": ["training.mode=end_to_end", "precision.optimizer=bf16"],
    "fp8_matmuls": ["training.mode=end_to_end", "training.progressive.new_stack_precision=fp8"],
    "layerwise_host_cache": [*_GROWN, "cache.tier=host", "precision.cache=fp8", "precision.trunk=nvfp4"],
    "stackwise_device_cache": ["training.mode=stackwise", "model.architecture.blocks_per_stack=2", "cache.tier=device"],
    "right_to_left_nvfp4": [*_GROWN, "training.progressive.direction=right_to_left", "precision.trunk=nvfp4"],
    "qlora": ["training.mode=progressive", "training.progressive.trunk_strategy=qlora", "precision.trunk=nf4"],
    "chained": ["training.mode=end_to_end", "training.execution=chained"],
    "encoder_mlm": [
        *_MASKED,
        "objective.name=mlm",
        "training.mode=end_to_end",
        "model.ffn=gelu",
        "model.norm=layernorm",
    ],
    "diffusion": [*_MASKED, "objective.name=diffusion", "objective.time=input", "training.mode=end_to_end"],
    "documents_dropout": ["data.isolate_documents=True", "model.dropout=0.1", "training.mode=end_to_end"],
    "phase_0": [*_GROWN, "model.vocab_size=131072", "model.architecture.n_stacks=1"],
    "block_70b": ["WIDE", *_GROWN, "cache.tier=host", "precision.cache=fp8", "precision.trunk=nvfp4"],
    "block_70b_int8": ["WIDE", *_GROWN, *_NARROW, "training.batch_size=1", "cache.tier=host", "precision.trunk=nvfp4"],
}
COLUMNS = f"{'pair':<24}{'plan':>12}{'measured':>12}{'error':>9}  phase"


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
      planned, measured: bytes.
      phase: the one that the plan has needing most, or the one compared.
    """

    name: str
    planned: int
    measured: int
    phase: str

    @property
    def error(self) -> float:
        """Of the plan, as a share of what was measured."""
        return self.planned / self.measured - 1.0


def make_options() -> flags.FlagValues:
    """The flags of this benchmark."""
    options = flags.FlagValues()
    flags.DEFINE_list("pairs", ["all"], f"all, or some of {', '.join(PAIRS)}.", flag_values=options)
    flags.DEFINE_multi_string("set", [], "A config field of all pairs: --set=model.d_model=1024.", flag_values=options)
    flags.DEFINE_bool(
        "compiled", False, "Compare train steps with the compiler's count, run nothing.", flag_values=options
    )
    flags.DEFINE_integer("minutes", 10, "Until a pair is given up.", lower_bound=1, flag_values=options)
    flags.DEFINE_string("json", "", "A file that the figures are written to.", flag_values=options)
    return options


def main(options: Any) -> None:
    """Compares and prints a line a pair, then median and worst; the device is left to the pairs' own processes."""
    configs = {name: make_config(name, options.set) for name in chosen(options.pairs)}
    print(COLUMNS, flush=True)
    rows: list[Row] = []
    for name, config in configs.items():
        for row in compiled_rows(name, config) if options.compiled else [measured_row(name, config, options.minutes)]:
            print(line(row), flush=True)
            rows.append(row)
    print(summary(rows))
    if options.json:
        entries = [dataclasses.asdict(row) | {"error": row.error} for row in rows]
        Path(options.json).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def chosen(names: Iterable[str]) -> list[str]:
    """The pairs asked for; UserError for an unknown one."""
    for name in names:
        if name not in (*PAIRS, "all"):
            raise UserError(f"--pairs={name} must be among: all, {', '.join(PAIRS)}.{did_you_mean(name, PAIRS)}")
    return list(PAIRS) if "all" in names else list(names)


def make_config(name: str, overrides: list[str]) -> RunConfig:
    """The run of a pair: two updates a phase on random rows."""
    entries = config_lib.default()
    entries.name = f"bench_memory_{name}"
    changes = [change for change in PAIRS[name] if change != "WIDE"]
    if len(changes) < len(PAIRS[name]):
        entries.model.update(families.llama("70b"))
        entries.data.seq_len = 4096
        entries.training.batch_size = 4
    else:
        entries.model.update({"vocab_size": 16384, "d_model": 2048, "n_heads": 16, "d_ff": 5632})
        entries.data.seq_len = 1024
        entries.training.batch_size = 16
    entries.model.architecture.update({"n_stacks": 4 if entries.model.d_model < 8192 else 2, "blocks_per_stack": 1})
    entries.data.isolate_documents = False
    entries.training.update({"phase_budget": "2 steps", "embedding_budget": "2 steps"})
    entries.precision.update({"compute": "bf16", "trunk": "bf16", "cache": "bf16"})
    entries.checkpoint.keep = 1
    apply_overrides(entries, [*changes, *overrides])
    rows = entries.training.batch_size
    entries.data.max_rows, entries.evaluation.rows = 8 * rows, rows
    return config_lib.resolve(entries)


def measured_row(name: str, config: RunConfig, minutes: float) -> Row:
    """Runs a pair in a process of its own.

    Raises:
      UserError: it failed; its last words.
    """
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.TemporaryDirectory(prefix="stackwise_memory_") as folder:
        done = subprocess.run(
            [*ROW_COMMAND, config_lib.to_json(config), folder],
            capture_output=True, text=True, timeout=60 * minutes, check=False, env=environment,
        )  # fmt: skip
    if done.returncode:
        words = [text.strip() for text in done.stderr.splitlines() if text.strip()]
        raise UserError(f"pair {name}: {words[-1] if words else f'it ended with exit code {done.returncode}'}")
    return Row(name, **json.loads(done.stdout.splitlines()[-1]))


def compiled_rows(name: str, config: RunConfig) -> Iterator[Row]:
    """The train step of each kind of phase, as this backend's compiler counts it; chains of programs are left out."""
    from stackwise_jax.bench.live_step import program_bytes
    from stackwise_jax.ops.target import NO_GPU
    from stackwise_jax.train.footprint import comparable, compiled_step, training_bytes
    from stackwise_jax.train.plan import make_plan

    plan = make_plan(config, None)
    seen = set()
    for phase, signatures in zip(plan.phases, plan.signatures, strict=True):
        for sig in signatures:
            if sig in seen or sig.execution == "chained":
                continue
            seen.add(sig)
            measured = program_bytes(compiled_step(comparable(config), sig))
            if measured is not None:
                yield Row(name, training_bytes(comparable(config), sig, NO_GPU).total, measured, phase.name)


def line(row: Row) -> str:
    """A row of the table."""
    planned, measured = readable_bytes(row.planned), readable_bytes(row.measured)
    return f"{row.name:<24}{planned:>12}{measured:>12}{row.error:>+9.1%}  {row.phase}"


def summary(rows: list[Row]) -> str:
    """Median and worst of the errors."""
    errors = [row.error for row in rows]
    median = statistics.median(abs(error) for error in errors)
    return f"median {median:.1%}, from {min(errors):+.1%} to {max(errors):+.1%}, {len(rows)} comparisons"
