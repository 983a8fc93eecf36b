"""How fast one block of a large model trains: the live step of a growing rack, its share of the device's matmuls.

One block of a LLaMA shape on random activations, as in a cached phase: forward, gradients of the weights, AdamW with
its clip by the global norm. The loss is a fixed linear function of what the block puts out, so that the block is all
that is measured; --head adds rows with the frozen head and its loss, the whole live step. Beside it, where PyTorch is
installed, `transformers`' block of the same shape under `torch.compile`:
python -m stackwise_jax.bench block --size=70b --batch_size=4 --seq_len=4096
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from absl import flags

from stackwise_jax import config as config_lib
from stackwise_jax.bench import torch_block, torch_step
from stackwise_jax.bench.live_step import MATMUL, compile_step, matmul_flops, program_bytes
from stackwise_jax.errors import UserError, did_you_mean
from stackwise_jax.models import families
from stackwise_jax.overrides import apply_overrides
from stackwise_jax.schema import RunConfig

TORCH_SECONDS = 300  # until the process that measures PyTorch is given up
FP8 = ["training.progressive.new_stack_precision=fp8"]
BF16_WEIGHTS = ["precision.weights=bf16", "precision.optimizer=int8"]
ROWS = {
    "bf16": [],
    "fp8": FP8,
    "fp8_int8": [*FP8, "precision.optimizer=int8"],
    "bf16_small": BF16_WEIGHTS,
    "fp8_small": [*FP8, *BF16_WEIGHTS],
}


@dataclasses.dataclass(frozen=True)
class Figures:
    """One measurement.

    Attributes:
      step_seconds: median; None where it failed.
      flops: of a step: 6 a weight and token, attention, and the head as far as it is computed.
      memory: bytes: by the compiler's count (ours), by the allocator's (PyTorch's).
      failed: why there is no figure, one line.
    """

    name: str
    step_seconds: float | None = None
    flops: float = 0.0
    compile_seconds: float | None = None
    memory: int | None = None
    failed: str | None = None


def make_options() -> flags.FlagValues:
    """The flags of this benchmark."""
    options = flags.FlagValues()
    flags.DEFINE_enum("size", "70b", list(families.LLAMA_SIZES), "Shape of the block.", flag_values=options)
    flags.DEFINE_integer("seq_len", 4096, "Tokens a row.", lower_bound=2, flag_values=options)
    flags.DEFINE_integer("batch_size", 4, "Rows a step.", lower_bound=1, flag_values=options)
    flags.DEFINE_integer("steps", 20, "Steps timed, after 5 of warm-up.", lower_bound=1, flag_values=options)
    flags.DEFINE_list("rows", ["bf16", "fp8"], f"all, or some of {', '.join(ROWS)}.", flag_values=options)
    flags.DEFINE_bool("head", False, "Also the whole live step, with the frozen head.", flag_values=options)
    flags.DEFINE_multi_string("set", [], "A config field: --set=training.remat=dots; repeatable.", flag_values=options)
    flags.DEFINE_bool("torch", None, "Also PyTorch; by default where it is installed.", flag_values=options)
    flags.DEFINE_bool("profile", False, "Also the device's kernels of every row by their time.", flag_values=options)
    flags.DEFINE_string("json", "", "A file that the figures are written to.", flag_values=options)
    return options


def main(options: Any) -> None:
    """Measures and prints a table, each row as soon as it is known."""
    chosen = list(ROWS) if "all" in options.rows else options.rows
    for name in chosen:
        if name not in ROWS:
            raise UserError(f"--rows={name} must be among: all, {', '.join(ROWS)}.{did_you_mean(name, ROWS)}")
    config = make_config(options, [])
    theirs = torch_rows(config, options)  # before JAX takes the device's memory
    import jax

    from stackwise_jax.memory.placement import start_backend

    start_backend()
    flops, tokens = block_flops(config), config.training.batch_size * config.data.seq_len
    peaks = {kind: matmul_flops(kind) for kind in ("bf16", "fp8")}
    model = config.model
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; one block of width {model.d_model}, {model.n_heads} "
        f"heads on {model.n_kv_heads}, feed-forward {model.d_ff}; {config.training.batch_size} rows of "
        f"{config.data.seq_len} tokens, {flops / 1e12:.4g} TFLOP a step"
    )
    known = [f"{peak / 1e12:.0f} TFLOP/s in {kind}" for kind, peak in peaks.items() if peak]
    print(f"a matmul of {MATMUL}: {', '.join(known) or 'not timed on a CPU'}")
    names = ("ms/step", "tokens/s", "TFLOP/s", "of matmul %", "memory", "compile s")
    print(f"{'':<36}" + "".join(f"{name:>13}" for name in names))
    found = []

    def show(row: Figures, kind: str) -> None:
        print(line(row, tokens, peaks[kind]), flush=True)
        found.append(row)

    for row in theirs:
        show(row, "bf16")
    for name in chosen:
        own = make_config(options, ROWS[name])
        kind = "fp8" if own.training.progressive.new_stack_precision == "fp8" else "bf16"
        for with_head in (False, True) if options.head else (False,):
            row, kernels = measure(f"{name}, with head" if with_head else name, own, options, with_head=with_head)
            show(row, kind)
            print(kernels, end="", flush=True)
    if options.json:
        path = Path(options.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([dataclasses.asdict(row) for row in found], indent=2) + "\n", encoding="utf-8")


def make_config(options: Any, changes: list[str]) -> RunConfig:
    """A run of two stacks of one block, the second of which is what is measured."""
    entries = config_lib.default()
    entries.name = "bench_block"
    entries.model.update(families.llama(options.size))
    entries.model.architecture.update({"n_stacks": 2, "blocks_per_stack": 1})
    entries.data.update({"seq_len": options.seq_len, "isolate_documents": False})
    entries.training.update({"mode": "layerwise", "head": "frozen", "batch_size": options.batch_size})
    entries.precision.update({"compute": "bf16", "trunk": "bf16", "cache": "bf16"})
    apply_overrides(entries, [*changes, *options.set])
    return config_lib.resolve(entries)


def block_flops(config: RunConfig) -> float:
    """FLOPs of a step of one block: three times forward."""
    from stackwise_jax.memory.budget import block_forward_flops

    tokens = config.training.batch_size * config.data.seq_len
    return 3.0 * block_forward_flops(config.model, config.data.seq_len) * tokens


def head_flops(config: RunConfig) -> float:
    """FLOPs of a step of the frozen head: forward and the gradient of its input, at the places that are scored."""
    from stackwise_jax.memory.budget import head_forward_flops

    tokens = config.training.batch_size * config.data.seq_len * config.training.loss_fraction
    return 2.0 * head_forward_flops(config.model) * tokens


def measure(name: str, config: RunConfig, options: Any, *, with_head: bool) -> tuple[Figures, str]:
    """Compiles and times a step; the second result is its kernels as text, where they are asked for."""
    import jax

    flops = block_flops(config) + (head_flops(config) if with_head else 0.0)
    try:
        step = compile_step(config, 2, None if with_head else make_block_gradients)
        seconds, _ = step.time(options.steps)
        kernels = step.profile() + "\n" if options.profile else ""
    except (UserError, jax.errors.JaxRuntimeError) as error:
        return Figures(name, failed=str(error).splitlines()[0]), ""
    return Figures(name, seconds, flops, step.compile_seconds, program_bytes(step.compiled)), kernels


def make_block_gradients(program: Any, signature: Any) -> Any:
    """As `train.step.make_gradients`, of half the sum of squares of what the block puts out."""
    import jax
    import jax.numpy as jnp

    from stackwise_jax.train.phases import Role

    def loss(live: Any, frozen: Any, batch: Any, activations: Any) -> Any:
        example = program.corrupt(signature.task, batch)
        context = program.context(signature.task, example, {})
        x, _ = program.apply_stack(Role.LIVE, live["stacks"][0], {}, activations, context, None)
        return 0.5 * jnp.sum(jnp.square(x.astype(jnp.float32)))

    def gradients(live: Any, frozen: Any, batch: Any, activations: Any, *_: Any) -> Any:
        total, grads = jax.value_and_grad(loss)(live, frozen, batch, activations)
        return grads, total, jnp.float32(batch.tokens.size)

    return gradients


def torch_rows(config: RunConfig, options: Any) -> list[Figures]:
    """PyTorch's rows, where it is installed."""
    missing = torch_step.missing_packages()
    if options.torch and missing:
        raise UserError(f"--torch needs {' and '.join(missing)}, which are not installed; install them, or --notorch")
    if missing or options.torch is False:
        return []
    print("measuring PyTorch, about a minute ...", flush=True)
    model = config.model
    shape = {name: getattr(model, name) for name in ("d_model", "n_heads", "n_kv_heads", "d_ff")}
    shape |= {"batch_size": options.batch_size, "seq_len": options.seq_len, "steps": options.steps}
    flops, rows = block_flops(config), []
    for entry in torch_block.run(shape, timeout_seconds=TORCH_SECONDS):
        known = (entry.get(name) for name in ("compile_seconds", "peak_bytes", "failed"))
        rows.append(Figures(entry["name"], entry.get("step_seconds"), flops, *known))
    return rows


def line(row: Figures, tokens: int, peak: float | None) -> str:
    """One row of the table; what a device does not say is a dash."""
    from stackwise_jax.memory.budget import readable_bytes

    if row.step_seconds is None:
        return f"{row.name:<36}  failed: {row.failed}"
    rate = row.flops / row.step_seconds
    cells = [
        f"{1e3 * row.step_seconds:.2f}",
        f"{tokens / row.step_seconds:.0f}",
        f"{rate / 1e12:.1f}",
        f"{100 * rate / peak:.1f}" if peak else "-",
        readable_bytes(row.memory) if row.memory else "-",
        f"{row.compile_seconds:.1f}" if row.compile_seconds is not None else "-",
    ]
    return f"{row.name:<36}" + "".join(f"{cell:>13}" for cell in cells)
