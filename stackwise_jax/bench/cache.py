"""What a tier of the activation cache costs: steps and advances with the cache on the device, in host memory, on disk.

The same layer-wise run through the loop of `stackwise_jax.main`, once a tier, in a temporary run folder. Exposed is
the share of a step's time that the tier adds to the device tier's; an advance reads and writes the whole cache. The
losses of all tiers must agree. By default the cache takes 8 GiB and a step some tens of milliseconds on a large GPU:
python -m stackwise_jax.bench cache --tiers=device,host,disk --folder=/fast/disk
"""

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from stackwise_jax import config as config_lib
from stackwise_jax.checks.choices import PRECISIONS
from stackwise_jax.errors import UserError, did_you_mean
from stackwise_jax.overrides import apply_overrides
from stackwise_jax.schema import RunConfig

WARMUP_STEPS = 5
TIERS = ("device", "host", "disk")
LOSS_TOLERANCE = 0.05  # nats, between tiers on an accelerator: cuDNN's gradients are not the same twice


@dataclasses.dataclass(frozen=True)
class Figures:
    """What one tier took.

    Attributes:
      cache_bytes: of the training cache.
      step_seconds: of every timed step of the cached phases.
      fill_seconds: until the embedding's output of all rows was cached.
      advance_seconds: of each advance through one stack.
      losses: of every step of the run.
    """

    tier: str
    cache_bytes: int
    step_seconds: list[float]
    fill_seconds: float
    advance_seconds: list[float]
    losses: list[float]


def make_options() -> flags.FlagValues:
    """The flags of this benchmark."""
    options = flags.FlagValues()
    flags.DEFINE_list(
        "tiers", list(TIERS), "What is measured; the first is what others stand against.", flag_values=options
    )
    flags.DEFINE_integer("stacks", 3, "Stacks of one block.", lower_bound=2, flag_values=options)
    flags.DEFINE_integer("d_model", 2048, "Width; heads of 64, feed-forward of 4 widths.", flag_values=options)
    flags.DEFINE_integer("seq_len", 512, "Tokens a row.", lower_bound=2, flag_values=options)
    flags.DEFINE_integer("batch_size", 64, "Rows a step.", lower_bound=1, flag_values=options)
    flags.DEFINE_integer("rows", 4096, "Rows that are cached.", lower_bound=1, flag_values=options)
    flags.DEFINE_integer("chunk_mib", 128, "Activations that move together.", lower_bound=1, flag_values=options)
    flags.DEFINE_integer("steps", 60, "Steps a phase, 5 of them warm-up.", lower_bound=8, flag_values=options)
    flags.DEFINE_enum("precision", "bf16", PRECISIONS, "Of arithmetic and trunk.", flag_values=options)
    flags.DEFINE_string("cache", "bf16", "Storage of the cache: fp32, bf16 or fp8.", flag_values=options)
    flags.DEFINE_string("prepared", "", "A prepared corpus; empty: the embedded text.", flag_values=options)
    flags.DEFINE_string(
        "folder", "", "Where the run folders lie, with the disk tier; empty: /tmp.", flag_values=options
    )
    flags.DEFINE_multi_string("set", [], "A config field: --set=cache.window_gib=2; repeatable.", flag_values=options)
    flags.DEFINE_string("json", "", "A file that the figures are written to.", flag_values=options)
    return options


def main(options: Any) -> None:
    """Runs every tier and prints a table; ends with exit code 1 where the losses disagree."""
    for tier in options.tiers:
        if tier not in TIERS:
            raise UserError(f"--tiers={tier} must be among: {', '.join(TIERS)}.{did_you_mean(tier, TIERS)}")
    config = make_config(options)
    import jax

    from stackwise_jax.data.corpus import prepare_corpus
    from stackwise_jax.memory.placement import start_backend

    start_backend()
    corpus = prepare_corpus(config, report=lambda line: print(line, flush=True))
    measured: list[Figures] = []
    for tier in options.tiers:
        of_tier = dataclasses.replace(config, cache=dataclasses.replace(config.cache, tier=tier))
        with tempfile.TemporaryDirectory(dir=options.folder or None) as folder:
            figures = measure(of_tier, corpus, Path(folder) / "run")
        if not measured:
            print(
                f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {options.stacks} stacks of one block of width "
                f"{options.d_model}, {options.batch_size} rows of {options.seq_len} tokens a step; a cache of "
                f"{figures.cache_bytes / 2**30:.3f} GiB in {config.precision.cache}"
            )
            print(HEADER, flush=True)
        measured.append(figures)
        print(line_of(figures, measured[0]), flush=True)
    tolerance = 0.0 if jax.default_backend() == "cpu" else LOSS_TOLERANCE
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        document = {"device": jax.devices()[0].device_kind, "config": dataclasses.asdict(config)}
        document["tiers"] = [dataclasses.asdict(figures) for figures in measured]
        Path(options.json).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    furthest = max(largest_difference(measured[0], other) for other in measured)
    print(f"losses of all {len(measured[0].losses)} steps differ between tiers by at most {furthest:.3g} nats")
    if not furthest <= tolerance:
        raise SystemExit(f"error: that is more than {tolerance:g}: the tiers do not hold the same numbers")


HEADER = f"{'tier':<8}{'ms/step':>10}{'mean':>10}{'exposed':>10}{'fill s':>10}{'GB/s':>8}{'advance s':>12}{'GB/s':>8}"


def line_of(figures: Figures, base: Figures) -> str:
    """One tier: median and mean step, the share it adds to the base's mean, filling and advancing with their rates."""
    mean, of_base = statistics.mean(figures.step_seconds), statistics.mean(base.step_seconds)
    advance, size = statistics.mean(figures.advance_seconds), figures.cache_bytes / 1e9
    return (
        f"{figures.tier:<8}{1e3 * statistics.median(figures.step_seconds):>10.2f}{1e3 * mean:>10.2f}"
        f"{mean / of_base - 1:>10.1%}{figures.fill_seconds:>10.2f}{size / figures.fill_seconds:>8.2f}"
        f"{advance:>12.2f}{2 * size / advance:>8.2f}"
    )


def largest_difference(first: Figures, second: Figures) -> float:
    """Between the losses of two tiers, step by step, in nats; infinite where one run is shorter or not a number."""
    if len(first.losses) != len(second.losses):
        return float("inf")
    differences = [abs(a - b) for a, b in zip(first.losses, second.losses, strict=True)]
    return max(difference if difference == difference else float("inf") for difference in differences)


def make_config(options: Any) -> RunConfig:
    """The run that is measured, in no tier yet.

    Raises:
      UserError: sizes that do not fit.
    """
    if options.d_model % 64:
        raise UserError(f"--d_model={options.d_model} must be a multiple of 64, the width of a head")
    entries = config_lib.default()
    entries.name = "bench_cache"
    entries.model.update({"d_model": options.d_model, "n_heads": options.d_model // 64, "d_ff": 4 * options.d_model})
    entries.model.architecture.n_stacks = options.stacks
    entries.data.update({"seq_len": options.seq_len, "max_rows": options.rows, "isolate_documents": False})
    entries.data.update({"prepared": options.prepared, "max_bytes": 12_000_000})
    entries.training.update({"mode": "layerwise", "batch_size": options.batch_size, "embedding_budget": "1 steps"})
    entries.training.phase_budget = f"{options.steps} steps"
    entries.training.progressive.cache_activations = True
    entries.precision.update({"compute": options.precision, "trunk": options.precision, "cache": options.cache})
    entries.cache.chunk_bytes = options.chunk_mib * 2**20
    entries.checkpoint.keep = 1
    entries.logging.every_steps = 1
    entries.evaluation.rows = options.batch_size
    apply_overrides(entries, options.set)
    return config_lib.resolve(entries)


def measure(config: RunConfig, corpus: Any, folder: Path) -> Figures:
    """Trains the run in one tier."""
    from stackwise_jax.train import loop

    run = loop.Run(config, corpus, folder, lambda _: None)
    prepared: list[float] = []
    run.inputs.prepare = timed(run.inputs.prepare, prepared)
    run.to_end()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    cached = {phase.name for phase in run.plan.phases if phase.cached}
    timed_steps = [line for line in steps if line["phase"] in cached and line["phase_step"] > WARMUP_STEPS]
    _, fill, *advances = prepared  # the first phase caches nothing
    return Figures(
        tier=config.cache.tier,
        cache_bytes=run.plan.cache_bytes,
        step_seconds=[run.plan.tokens_per_step / line["tokens_per_second"] for line in timed_steps],
        fill_seconds=fill,
        advance_seconds=advances,
        losses=[line["loss"] for line in steps],
    )


def timed(function: Callable[..., None], seconds: list[float]) -> Callable[..., None]:
    """The same function, each call's time appended to `seconds`, with the device's work that it left behind."""
    import jax

    def call(*arguments: Any) -> None:
        started = time.perf_counter()
        function(*arguments)
        jax.block_until_ready(jax.live_arrays())
        seconds.append(time.perf_counter() - started)

    return call
