"""How fast a train step is: the very step of end-to-end training, its share of the peak, and PyTorch beside it.

Published models at their usual shapes on random tokens: milliseconds a step (median), tokens/s, model TFLOP/s by the
plan's count, MFU, memory. Beside it, where PyTorch is installed, the same model under `torch.compile` of
`transformers`. Weights and moments once in float32 and once in 16 bits, each against its like there. --set changes any
config field; --variants times changes of interest one after another; --profile says which kernels the time goes to:
python -m stackwise_jax.bench step --model=gpt2:small,bert:base --variants=all
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from stackwise_jax import config as config_lib
from stackwise_jax.bench import torch_step
from stackwise_jax.bench.live_step import MATMUL, WARMUP_STEPS, compile_step, matmul_flops, program_bytes
from stackwise_jax.errors import UserError, did_you_mean
from stackwise_jax.models import families
from stackwise_jax.overrides import apply_overrides
from stackwise_jax.schema import RunConfig

TORCH_SECONDS = 150  # a measurement, until the process that measures PyTorch is given up

MODELS = ["gpt2:small", "bert:base", "modernbert:base", "llama:1b"]
# Of each family its sizes, and its usual rows, tokens a row and objective.
FAMILIES: dict[str, tuple[Callable[[str], dict[str, Any]], dict[str, Any]]] = {
    "gpt2": (families.gpt2, {"training": {"batch_size": 16}, "data": {"seq_len": 1024}}),
    "bert": (
        families.bert,
        {"training": {"batch_size": 64}, "data": {"seq_len": 512}, "objective": {"name": "mlm"}},
    ),
    "modernbert": (
        families.modernbert,
        {
            "training": {"batch_size": 16},
            "data": {"seq_len": 1024},
            "objective": {"name": "mlm", "rate_min": 0.3, "rate_max": 0.3},
        },
    ),
    "llama": (families.llama, {"training": {"batch_size": 4}, "data": {"seq_len": 2048}}),
}
# What stands beside PyTorch's weights and moments of bfloat16: those of matrices of blocks are too, their updates
# rounded stochastically. Embedding, head and vectors keep weights of float32, which PyTorch's there do not.
BF16_WEIGHTS = ["precision.weights=bf16", "precision.optimizer=bf16"]
VARIANTS = {
    "loop": ["training.unroll_blocks=1"],
    "stacks_of_1": ["model.architecture.n_stacks={blocks}", "model.architecture.blocks_per_stack=1"],
    "loss_1024": ["training.loss_chunk_tokens=1024"],
    "loss_4096": ["training.loss_chunk_tokens=4096"],
    "loss_16384": ["training.loss_chunk_tokens=16384"],
    "attention_xla": ["model.attention_implementation=xla"],
    "documents": ["data.isolate_documents=True"],
    "documents_xla": ["data.isolate_documents=True", "model.attention_implementation=xla"],
    "remat_dots": ["training.remat=dots"],
    "remat_full": ["training.remat=full"],
    "dropout": ["model.dropout=0.1"],
    "no_clip": ["optimizer.clip_norm=0"],
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
      name: what was measured.
      step_seconds: median; None where it failed.
      compile_seconds: until the first step was ready to run.
      peak_bytes: of device memory: by the compiler's count (ours), by the allocator's (PyTorch's); None: unknown.
      failed: why there is no figure, one line.
    """

    name: str
    step_seconds: float | None = None
    compile_seconds: float | None = None
    peak_bytes: int | None = None
    failed: str | None = None


def make_options() -> flags.FlagValues:
    """The flags of this benchmark."""
    options = flags.FlagValues()
    flags.DEFINE_list("model", MODELS, f"FAMILY:SIZE, several in turn; of {', '.join(FAMILIES)}.", flag_values=options)
    flags.DEFINE_integer("seq_len", None, "Tokens a row; by default as usual.", lower_bound=2, flag_values=options)
    flags.DEFINE_integer("batch_size", None, "Rows a step; by default as usual.", lower_bound=1, flag_values=options)
    flags.DEFINE_integer("steps", 25, "Steps timed, after 5 of warm-up.", lower_bound=1, flag_values=options)
    flags.DEFINE_multi_string("set", [], "A config field: --set=training.remat=dots; repeatable.", flag_values=options)
    flags.DEFINE_list("variants", [], f"Also: all, or some of {', '.join(VARIANTS)}.", flag_values=options)
    flags.DEFINE_bool("torch", None, "Also PyTorch; by default where it is installed.", flag_values=options)
    flags.DEFINE_bool("profile", False, "Also the device's kernels by their time.", flag_values=options)
    flags.DEFINE_string("json", "", "A file that the figures are written to.", flag_values=options)
    return options


def main(options: Any) -> None:
    """Measures and prints a table a model, each row of ours as soon as it is known."""
    configs = {name: chosen_configs(name, options) for name in options.model}
    if not configs:
        raise UserError(f"--model= names no model; give FAMILY:SIZE, such as --model={MODELS[0]}")
    missing = torch_step.missing_packages()
    if options.torch and missing:
        raise UserError(f"--torch needs {' and '.join(missing)}, which are not installed; install them, or --notorch")
    theirs: dict[str, dict[str, list[Row]]] = {name: {} for name in configs}
    if options.torch or (options.torch is None and not missing):  # before JAX takes the device's memory
        for name, own in configs.items():
            print(f"measuring {name} in PyTorch, minutes ...", flush=True)
            theirs[name] = torch_rows(next(iter(own.values())), options.steps)
    import jax

    from stackwise_jax.memory.placement import start_backend
    from stackwise_jax.train.metrics import peak_flops

    start_backend()
    peak, matmul = peak_flops(None), matmul_flops("bf16")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    if matmul:
        print(f"a bf16 matmul of {MATMUL}: {matmul / 1e12:.0f} TFLOP/s")
    measured = []
    for name, own in configs.items():
        measured.append(measure_model(name, own, theirs[name], options.steps, (peak, matmul)))
        if options.profile:
            print(compile_step(next(iter(own.values()))).profile(), flush=True)
    if options.json:
        device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        figures = {"peak_flops": peak, "matmul_flops": matmul, "models": measured}
        write_json(Path(options.json), device | figures)


def measure_model(
    name: str,
    configs: dict[str, RunConfig],
    theirs: dict[str, list[Row]],
    steps: int,
    peaks: tuple[float | None, float | None],
) -> dict[str, Any]:
    """Measures and prints one model's table.

    Args:
      configs: of `chosen_configs`.
      theirs: of `torch_rows`.
      peaks: of the device, as told and as reached by a large matmul.

    Returns:
      every figure, and the config of the first row of ours.
    """
    from stackwise_jax.models.rack import count_parameters
    from stackwise_jax.train.plan import make_plan

    config = next(iter(configs.values()))
    plan = make_plan(config, None)
    table = Table(plan.tokens_per_step, plan.step_flops[0], *peaks)
    print(
        f"\n{name}: {config.model.n_blocks} blocks of width {config.model.d_model}, vocabulary "
        f"{config.model.vocab_size}, {count_parameters(config.model):,} parameters; {config.training.batch_size} rows "
        f"of {config.data.seq_len} tokens, {plan.step_flops[0] / 1e12:.4g} TFLOP a step"
    )
    print(table.header(), flush=True)
    rows = [row for of_weights in theirs.values() for row in of_weights]
    for row in rows:
        print(table.line(row), flush=True)
    ours: dict[str, Row] = {}
    for own_name, own in configs.items():
        row = ours[own_name] = measure(own_name, own, steps)
        table.ours = table.ours or row.step_seconds
        print(table.line(row), flush=True)
    return {
        "model": name,
        "tokens_per_step": table.tokens,
        "flops_per_step": table.flops,
        "config": dataclasses.asdict(config),
        "rows": [dataclasses.asdict(row) for row in (*rows, *ours.values())],
        "speedups": speedups(ours, theirs),
    }


def speedups(ours: dict[str, Row], theirs: dict[str, list[Row]]) -> dict[str, float]:
    """Our tokens a second over those of the fastest of theirs with like weights, by the weights; prints them too."""
    found = {}
    for weights, rows in theirs.items():
        own = ours.get(our_name(weights), Row("")).step_seconds
        timed = {row.name: row.step_seconds for row in rows if row.step_seconds}
        if own and timed:
            fastest = min(timed, key=timed.__getitem__)
            found[weights] = timed[fastest] / own
            print(f"{our_name(weights)}: {found[weights]:.3f} times the tokens a second of {fastest}", flush=True)
    return found


def our_name(weights: str) -> str:
    """How a row of ours is called in the table."""
    return f"stackwise_jax, {weights} weights"


def chosen_variants(names: list[str]) -> list[str]:
    """The variants asked for; UserError for an unknown one."""
    for name in names:
        if name not in (*VARIANTS, "all"):
            known = ", ".join(("all", *VARIANTS))
            raise UserError(f"--variants={name} must be among: {known}.{did_you_mean(name, VARIANTS)}")
    return list(VARIANTS) if "all" in names else names


def chosen_configs(name: str, options: Any) -> dict[str, RunConfig]:
    """The runs of a model that are measured, by the names of their rows; none is there twice."""
    config = make_config(name, options, [])
    stored = {"fp32": "float32", "bf16": "bfloat16"}
    changes = {} if config.precision.weights == "bf16" else {our_name("bfloat16"): BF16_WEIGHTS}
    changes |= {variant: VARIANTS[variant] for variant in chosen_variants(options.variants)}
    found = {our_name(stored[config.precision.weights]): config}
    for variant, change in changes.items():
        changed = make_config(name, options, change)
        if changed != config:
            found[variant] = changed
    return found


def make_config(name: str, options: Any, changes: list[str]) -> RunConfig:
    """The run whose step is measured: one end-to-end phase of one stack, rows of one document, no dropout, unless a
    change says otherwise.

    Args:
      name: FAMILY:SIZE.

    Raises:
      UserError: no such model, or values that do not fit.
    """
    family, _, size = name.partition(":")
    if family not in FAMILIES or not size:
        known = ", ".join(FAMILIES)
        raise UserError(
            f"--model={name} must be FAMILY:SIZE, such as {MODELS[0]}, of {known}.{did_you_mean(family, FAMILIES)}"
        )
    published, usual = FAMILIES[family]
    entries = config_lib.default()
    entries.name = "bench_step"
    entries.model.update(published(size))
    entries.update(usual)
    blocks = entries.model.architecture.n_stacks * entries.model.architecture.blocks_per_stack
    entries.model.architecture.update({"n_stacks": 1, "blocks_per_stack": blocks})
    entries.model.dropout = 0.0
    entries.data.isolate_documents = False
    entries.data.seq_len = options.seq_len or entries.data.seq_len
    entries.training.batch_size = options.batch_size or entries.training.batch_size
    entries.training.update({"mode": "end_to_end", "execution": "fused"})
    entries.precision.compute = "bf16"
    apply_overrides(entries, [*options.set, *(change.format(blocks=blocks) for change in changes)])
    if entries.training.mode != "end_to_end":
        raise UserError(f"--set=training.mode={entries.training.mode}: this benchmark is of end_to_end training")
    return config_lib.resolve(entries)


def measure(name: str, config: RunConfig, steps: int) -> Row:
    """Compiles and times the train step of a config on random tokens."""
    import jax
    import numpy as np

    try:
        step = compile_step(config)
        median, loss = step.time(steps)
    except (UserError, jax.errors.JaxRuntimeError) as error:  # out of memory, or a kernel that cannot serve
        return Row(name, failed=str(error).splitlines()[0])
    if not np.isfinite(loss):
        return Row(name, failed=f"loss={loss} after {WARMUP_STEPS + steps} steps")
    return Row(name, median, step.compile_seconds, program_bytes(step.compiled))


def torch_rows(config: RunConfig, steps: int) -> dict[str, list[Row]]:
    """PyTorch's rows by their weights; a model that does not have our number of parameters counts as failed.

    The numbers are equal, heads and tables of token types included: we have no pooler, and neither have the models that
    `transformers` makes for a masked language model. It counts a tied table once, and so do we.
    """
    from stackwise_jax.interop.configs import to_theirs
    from stackwise_jax.interop.kinds import family_of
    from stackwise_jax.models.rack import count_parameters

    family = family_of(config.model)
    shape = {
        "model": to_theirs(family, config.model, dtype="float32", ids={}),
        "masked_share": None if config.objective.name == "clm" else config.objective.rate_max,
        "seq_len": config.data.seq_len,
        "batch_size": config.training.batch_size,
        "steps": steps,
    }
    kinds = torch_step.kinds_of(family)
    entries = torch_step.run(shape, timeout_seconds=TORCH_SECONDS * len(kinds))
    rows: dict[str, list[Row]] = {kind.weights: [] for kind in kinds}
    for kind, entry in zip(kinds, entries, strict=True):
        parameters, versions = entry.pop("parameters", None), entry.pop("versions", None)
        row = Row(**entry)
        if not row.failed and parameters != count_parameters(config.model):
            row = Row(row.name, failed=f"it has {parameters:,} parameters and ours {count_parameters(config.model):,}")
        if versions and kind == kinds[0]:
            print(versions)
        rows[kind.weights].append(row)
    return rows


@dataclasses.dataclass
class Table:
    """Rows as text; `ours` is the step time that others are shown against, once it is known."""

    tokens: int
    flops: float
    peak: float | None
    matmul: float | None
    ours: float | None = None

    def header(self) -> str:
        """The columns' names."""
        names = ("ms/step", "tokens/s", "TFLOP/s", "MFU %", "of matmul %", "memory", "compile s", "speed")
        return f"{'':<50}" + "".join(f"{name:>12}" for name in names)

    def line(self, row: Row) -> str:
        """One row; figures that a device does not give are a dash. Speed: against the first row of ours."""
        from stackwise_jax.memory.budget import readable_bytes

        if row.step_seconds is None:
            return f"{row.name:<50}  failed: {row.failed}"
        seconds, rate = row.step_seconds, self.flops / row.step_seconds
        cells = [
            f"{1e3 * seconds:.2f}",
            f"{self.tokens / seconds:.0f}",
            f"{rate / 1e12:.2f}",
            f"{100 * rate / self.peak:.1f}" if self.peak else "-",
            f"{100 * rate / self.matmul:.1f}" if self.matmul else "-",
            readable_bytes(row.peak_bytes) if row.peak_bytes else "-",
            f"{row.compile_seconds:.1f}" if row.compile_seconds is not None else "-",
            f"{self.ours / seconds:.3f}" if self.ours else "-",
        ]
        return f"{row.name:<50}" + "".join(f"{cell:>12}" for cell in cells)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Every figure, and what it was measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
