"""Depth costs nothing: seconds per step of every phase of a cached layer-wise run, against those of phase 2.

Trains a rack on the embedded corpus through the very loop of `stackwise_jax.main`, in a temporary run folder, and
takes the median of the steps of each phase. With --cache=false the trunk is recomputed, which shows what the cache
saves.
"""

import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from absl import flags

from stackwise_jax import config as config_lib
from stackwise_jax.checks.choices import PRECISIONS
from stackwise_jax.errors import UserError
from stackwise_jax.schema import RunConfig

WARMUP_STEPS = 5


def make_options() -> flags.FlagValues:
    """The flags of this benchmark."""
    options = flags.FlagValues()
    flags.DEFINE_integer("stacks", 12, "Stacks of one block.", lower_bound=2, flag_values=options)
    flags.DEFINE_integer("d_model", 128, "Width; heads of 64, feed-forward of 4 widths.", flag_values=options)
    flags.DEFINE_integer("seq_len", 128, "Tokens a row.", flag_values=options)
    flags.DEFINE_integer("batch_size", 16, "Rows a step.", flag_values=options)
    flags.DEFINE_integer("steps", 40, "Steps a phase, 5 of them warm-up.", lower_bound=8, flag_values=options)
    flags.DEFINE_enum("precision", "fp32", PRECISIONS, "Of arithmetic and cache.", flag_values=options)
    flags.DEFINE_bool("cache", True, "Keep the trunk's output.", flag_values=options)
    return options


def main(options: Any) -> None:
    """Runs, measures and prints a table."""
    import jax

    from stackwise_jax.data.corpus import prepare_corpus
    from stackwise_jax.train import loop

    config = make_config(options)
    corpus = prepare_corpus(config, report=lambda line: print(line, flush=True))
    with tempfile.TemporaryDirectory() as folder:
        run = loop.Run(config, corpus, Path(folder) / "run", lambda _: None)
        run.to_end()
        seconds = phase_seconds(Path(folder) / "run" / "metrics.jsonl", run.plan.tokens_per_step)
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, {'cached' if options.cache else 'recomputed'} trunk, {options.precision}")
    print(f"{'phase':<12} {'ms/step':>9} {'over phase 2':>13} {'tokens/s':>10}")
    names = [name for name in seconds if name.startswith("stack")]
    for name in names:
        ratio = seconds[name] / seconds[names[1]]
        print(
            f"{name:<12} {1e3 * seconds[name]:>9.2f} {ratio:>13.3f} {run.plan.tokens_per_step / seconds[name]:>10.0f}"
        )
    print(f"last phase over phase 2: {seconds[names[-1]] / seconds[names[1]]:.3f}")


def make_config(options: Any) -> RunConfig:
    """The run that is measured.

    Raises:
      UserError: sizes that do not fit.
    """
    if options.d_model % 64:
        raise UserError(f"--d_model={options.d_model} must be a multiple of 64, the width of a head")
    entries = config_lib.default()
    entries.name = "bench_depth"
    entries.model.update({"d_model": options.d_model, "n_heads": options.d_model // 64, "d_ff": 4 * options.d_model})
    entries.model.architecture.n_stacks = options.stacks
    entries.data.update({"seq_len": options.seq_len, "max_bytes": 4_000_000})
    entries.training.update({"mode": "layerwise", "batch_size": options.batch_size, "embedding_budget": "1 steps"})
    entries.training.phase_budget = f"{options.steps} steps"
    entries.training.progressive.cache_activations = options.cache
    entries.precision.update(dict.fromkeys(("compute", "trunk", "cache"), options.precision))
    entries.logging.every_steps = 1
    entries.evaluation.rows = options.batch_size
    return config_lib.resolve(entries)


def phase_seconds(metrics: Path, tokens_per_step: int) -> dict[str, float]:
    """Median seconds per step of each phase, its warm-up left out."""
    seconds = defaultdict(list)
    for line in metrics.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["kind"] == "train" and entry["phase_step"] > WARMUP_STEPS:
            seconds[entry["phase"]].append(tokens_per_step / entry["tokens_per_second"])
    return {phase: statistics.median(values) for phase, values in seconds.items()}
