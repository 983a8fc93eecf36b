"""How fast a train step is: the very step of end-to-end training, its share of the peak, and PyTorch beside it.

A model of the GPT-2 small shape on random tokens: milliseconds a step (median), tokens/s, model TFLOP/s by the plan's
count, MFU, memory. Beside it, where PyTorch is installed, the same shape under `torch.compile` of `transformers`.
--set changes any config field; --variants times changes of interest one after another; --profile says which kernels the
time goes to:
python -m stackwise_jax.bench step --family=gpt2 --seq_len=1024 --variants=all
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from absl import flags

from stackwise_jax import config as config_lib
from stackwise_jax.bench import torch_step
from stackwise_jax.bench.live_step import MATMUL, WARMUP_STEPS, compile_step, matmul_flops, program_bytes
from stackwise_jax.checks.choices import PRECISIONS
from stackwise_jax.errors import UserError, did_you_mean
from stackwise_jax.overrides import apply_overrides
from stackwise_jax.schema import RunConfig

TORCH_SECONDS = 300  # until the process that measures PyTorch is given up

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},  # the defaults: RMSNorm, SwiGLU, rotary positions, no biases, an untied head
    "gpt2": {
        "norm": "layernorm",
        "ffn": "gelu",
        "positions": "learned",
        "use_bias": True,
        "ties_embedding": True,
    },
}
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
    flags.DEFINE_enum("family", "llama", list(FAMILIES), "Kind of block and head.", flag_values=options)
    flags.DEFINE_integer("blocks", 12, "Blocks of the model.", lower_bound=1, flag_values=options)
    flags.DEFINE_integer("blocks_per_stack", None, "Blocks a stack; all of them by default.", flag_values=options)
    flags.DEFINE_integer("d_model", 768, "Width; heads of 64.", lower_bound=64, flag_values=options)
    flags.DEFINE_integer("vocab_size", 16384, "Rows of the token table.", lower_bound=16, flag_values=options)
    flags.DEFINE_integer("seq_len", 512, "Tokens a row.", lower_bound=2, flag_values=options)
    flags.DEFINE_integer("batch_size", 32, "Rows a step.", lower_bound=1, flag_values=options)
    flags.DEFINE_integer("steps", 25, "Steps timed, after 5 of warm-up.", lower_bound=1, flag_values=options)
    flags.DEFINE_enum("precision", "bf16", PRECISIONS, "Of arithmetic.", flag_values=options)
    flags.DEFINE_multi_string("set", [], "A config field: --set=training.remat=dots; repeatable.", flag_values=options)
    flags.DEFINE_list("variants", [], f"Also: all, or some of {', '.join(VARIANTS)}.", flag_values=options)
    flags.DEFINE_bool("torch", None, "Also PyTorch; by default where it is installed.", flag_values=options)
    flags.DEFINE_bool("profile", False, "Also the device's kernels by their time.", flag_values=options)
    flags.DEFINE_string("json", "", "A file that the figures are written to.", flag_values=options)
    return options


def main(options: Any) -> None:
    """Measures and prints a table, each row as soon as it is known."""
    config = make_config(options, [])
    variants = [(name, make_config(options, VARIANTS[name])) for name in chosen_variants(options.variants)]
    variants = [(name, variant) for name, variant in variants if variant != config]
    missing = torch_step.missing_packages()
    if options.torch and missing:
        raise UserError(f"--torch needs {' and '.join(missing)}, which are not installed; install them, or --notorch")
    rows = []
    if options.torch or (options.torch is None and not missing):  # before JAX takes the device's memory
        print("measuring PyTorch, about a minute ...", flush=True)
        rows = torch_rows(config, options)
    import jax

    from stackwise_jax.memory.placement import start_backend
    from stackwise_jax.models.rack import count_parameters
    from stackwise_jax.train.metrics import peak_flops
    from stackwise_jax.train.plan import make_plan

    start_backend()
    plan = make_plan(config, None)
    table = Table(plan.tokens_per_step, plan.step_flops[0], peak_flops(None), matmul_flops("bf16"))
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {options.family}, {config.model.n_blocks} blocks of "
        f"width {config.model.d_model}, vocabulary {config.model.vocab_size}, {count_parameters(config.model):,} "
        f"parameters; {config.training.batch_size} rows of {config.data.seq_len} tokens, "
        f"{plan.step_flops[0] / 1e12:.4g} TFLOP a step"
    )
    if table.matmul:
        print(f"a bf16 matmul of {MATMUL}: {table.matmul / 1e12:.0f} TFLOP/s")
    print(table.header(), flush=True)
    for row in rows:
        print(table.line(row), flush=True)
    for name, variant in [("stackwise_jax", config), *variants]:
        row = measure(name, variant, options.steps)
        table.ours = table.ours or row.step_seconds
        print(table.line(row), flush=True)
        rows.append(row)
    for row in rows:
        if row.name.startswith("transformers") and row.step_seconds and table.ours:
            print(f"stackwise_jax over {row.name}: {row.step_seconds / table.ours:.3f} times the tokens a second")
    if options.profile:
        print(compile_step(config).profile(), flush=True)
    if options.json:
        write_json(Path(options.json), table, config, rows)


def chosen_variants(names: list[str]) -> list[str]:
    """The variants asked for; UserError for an unknown one."""
    for name in names:
        if name not in (*VARIANTS, "all"):
            known = ", ".join(("all", *VARIANTS))
            raise UserError(f"--variants={name} must be among: {known}.{did_you_mean(name, VARIANTS)}")
    return list(VARIANTS) if "all" in names else names


def make_config(options: Any, changes: list[str]) -> RunConfig:
    """The run whose step is measured: one end-to-end phase, rows of one document unless a change says otherwise.

    Raises:
      UserError: sizes that do not fit.
    """
    blocks, width = options.blocks, options.d_model
    per_stack = options.blocks_per_stack or blocks
    if width % 64:
        raise UserError(f"--d_model={width} must be a multiple of 64, the width of a head")
    if blocks % per_stack:
        raise UserError(f"--blocks_per_stack={per_stack} must divide --blocks={blocks}")
    entries = config_lib.default()
    entries.name = "bench_step"
    entries.model.update({"d_model": width, "n_heads": width // 64, "vocab_size": options.vocab_size})
    entries.model.d_ff = 64 * -(-8 * width // 192) if options.family == "llama" else 4 * width
    entries.model.update(FAMILIES[options.family])
    entries.model.architecture.update({"n_stacks": blocks // per_stack, "blocks_per_stack": per_stack})
    entries.data.update({"seq_len": options.seq_len, "isolate_documents": False})
    entries.training.update({"mode": "end_to_end", "batch_size": options.batch_size, "execution": "fused"})
    entries.precision.compute = options.precision
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


def torch_rows(config: RunConfig, options: Any) -> list[Row]:
    """PyTorch's rows; a model that does not have our number of parameters counts as failed."""
    from stackwise_jax.models.rack import count_parameters

    shape = {"family": options.family, "blocks": config.model.n_blocks, "steps": options.steps}
    shape |= {name: getattr(config.model, name) for name in ("d_model", "n_heads", "d_ff", "vocab_size")}
    shape |= {"batch_size": config.training.batch_size, "seq_len": config.data.seq_len}
    rows = []
    for entry in torch_step.run(shape, timeout_seconds=TORCH_SECONDS):
        parameters, versions = entry.pop("parameters", None), entry.pop("versions", None)
        row = Row(**entry)
        if not row.failed and parameters != count_parameters(config.model):
            row = Row(row.name, failed=f"it has {parameters:,} parameters and ours {count_parameters(config.model):,}")
        if versions and not rows:
            print(versions)
        rows.append(row)
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
        return f"{'':<34}" + "".join(f"{name:>12}" for name in names)

    def line(self, row: Row) -> str:
        """One row; figures that a device does not give are a dash. Speed: against the first row of ours."""
        from stackwise_jax.memory.budget import readable_bytes

        if row.step_seconds is None:
            return f"{row.name:<34}  failed: {row.failed}"
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
        return f"{row.name:<34}" + "".join(f"{cell:>12}" for cell in cells)


def write_json(path: Path, table: Table, config: RunConfig, rows: list[Row]) -> None:
    """Every figure, and what it was measured on."""
    import jax

    document = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "tokens_per_step": table.tokens,
        "flops_per_step": table.flops,
        "peak_flops": table.peak,
        "matmul_flops": table.matmul,
        "config": dataclasses.asdict(config),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
