"""How fast adapters are trained through a whole frozen rack of 4 bits: the fusion phase of a large model on one device.

A random rack of a LLaMA shape is made on the device in its storage format, and the chained train step of the phase
`training.fusion.live=adapters` runs on random tokens: gradient through every stack, the activations between stacks
kept, the inside of each computed anew. FLOP/s are counted as 4 N a token, N being the parameters of the blocks: 2 N
forward and 2 N back through weights that take no gradient. What is computed anew, attention, adapters and the head are
not counted. Memory is the most that the device's allocator has ever held in this process:
python -m stackwise_jax.bench qlora --size=70b --batch_size=2 --seq_len=4096
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from absl import flags

from stackwise_jax import config as config_lib
from stackwise_jax.bench.live_step import MATMUL, CompiledStep, matmul_flops, random_batch
from stackwise_jax.checks.choices import QUANTISED
from stackwise_jax.errors import UserError
from stackwise_jax.models import families
from stackwise_jax.overrides import apply_overrides
from stackwise_jax.schema import RunConfig

WARMUP_STEPS = 2  # a step of a large rack takes seconds


@dataclasses.dataclass(frozen=True)
class Figures:
    """One measurement.

    Attributes:
      step_seconds: median.
      first_seconds: of the first step, which compiles.
      loss: of the last step, in nats per token.
      flops: of a step, at 4 N.
      peak_bytes: by the allocator; None: the device does not say.
      planned_bytes: by the plan.
      rack_bytes, boundary_bytes, adapter_bytes: of the blocks as stored, of all activations between stacks, of the
        adapters with their moments and gradients.
    """

    step_seconds: float
    first_seconds: float
    loss: float
    flops: float
    peak_bytes: int | None
    planned_bytes: int
    rack_bytes: int
    boundary_bytes: int
    adapter_bytes: int


def make_options() -> flags.FlagValues:
    """The flags of this benchmark."""
    options = flags.FlagValues()
    flags.DEFINE_enum("size", "70b", list(families.LLAMA_SIZES), "Shape of the rack.", flag_values=options)
    flags.DEFINE_integer("blocks", None, "Blocks, each a stack; by default the size's.", flag_values=options)
    flags.DEFINE_integer("seq_len", 4096, "Tokens a row.", lower_bound=2, flag_values=options)
    flags.DEFINE_integer("batch_size", 2, "Rows a step.", lower_bound=1, flag_values=options)
    flags.DEFINE_integer("rank", 16, "Of every adapter.", lower_bound=1, flag_values=options)
    flags.DEFINE_enum("trunk", "nvfp4", QUANTISED, "Storage of the stacks.", flag_values=options)
    flags.DEFINE_integer("steps", 5, f"Steps timed, after {WARMUP_STEPS} of warm-up.", flag_values=options)
    flags.DEFINE_multi_string(
        "set", [], "A config field: --set=precision.trunk_compute=fp8; repeatable.", flag_values=options
    )
    flags.DEFINE_bool("profile", False, "Also the device's kernels by their time.", flag_values=options)
    flags.DEFINE_string("json", "", "A file that the figures are written to.", flag_values=options)
    return options


def main(options: Any) -> None:
    """Measures and prints."""
    config = make_config(options)
    import jax

    from stackwise_jax.memory.budget import readable_bytes
    from stackwise_jax.memory.placement import start_backend

    start_backend()
    model, tokens = config.model, config.training.batch_size * config.data.seq_len
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {model.n_blocks} blocks of width {model.d_model} in "
        f"{config.precision.trunk}, adapters of rank {config.training.adapters.rank}; "
        f"{config.training.batch_size} rows of {config.data.seq_len} tokens"
    )
    kind = "fp8" if config.precision.trunk_compute == "fp8" else "bf16"
    peak = matmul_flops(kind)
    if peak:
        print(f"a {kind} matmul of {MATMUL}: {peak / 1e12:.0f} TFLOP/s", flush=True)
    found, kernels = measure(config, options.steps, with_profile=options.profile)
    rate = found.flops / found.step_seconds
    share = f", {100 * rate / peak:.1f} percent of the matmul's" if peak else ""
    print(f"{1e3 * found.step_seconds:.1f} ms a step (the first, which compiles: {found.first_seconds:.1f} s)")
    print(f"{tokens / found.step_seconds:.0f} tokens/s, {rate / 1e12:.3g} TFLOP/s at 4 N{share}; loss {found.loss:.3f}")
    parts = f"the rack {readable_bytes(found.rack_bytes)}, between stacks {readable_bytes(found.boundary_bytes)}"
    parts += f", adapters {readable_bytes(found.adapter_bytes)}"
    measured = readable_bytes(found.peak_bytes) if found.peak_bytes else "not told by this device"
    print(f"peak memory: {measured}; planned {readable_bytes(found.planned_bytes)}; of it {parts}")
    print(kernels, end="")
    if options.json:
        document = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "matmul_flops": peak}
        document |= {"config": dataclasses.asdict(config), **dataclasses.asdict(found)}
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def make_config(options: Any) -> RunConfig:
    """A run that grows a stack at a time and ends in the phase that is measured, chained however small the rack is.

    Raises:
      UserError: --set asks for another kind of phase, or fields that do not fit together.
    """
    entries = config_lib.default()
    entries.name = "bench_qlora"
    entries.model.update(families.llama(options.size))
    if options.blocks is not None:
        entries.model.architecture.n_stacks = options.blocks
    entries.data.update({"seq_len": options.seq_len, "isolate_documents": False})
    entries.training.update({"mode": "layerwise", "head": "frozen", "batch_size": options.batch_size})
    entries.training.execution = "chained"
    entries.training.fusion.update({"budget": f"{options.steps} steps", "live": "adapters", "embedding": "frozen"})
    entries.training.adapters.rank = options.rank
    entries.precision.update({"compute": "bf16", "trunk": options.trunk, "cache": "bf16"})
    apply_overrides(entries, options.set)
    fusion = entries.training.fusion
    if not (fusion.budget and fusion.live == "adapters" and fusion.embedding == "frozen"):
        raise UserError("this benchmark is of training.fusion.live=adapters with training.fusion.embedding=frozen")
    return config_lib.resolve(entries)


def measure(config: RunConfig, steps: int, *, with_profile: bool = False) -> tuple[Figures, str]:
    """Makes the rack and times the step; the second result is its kernels as text, where they are asked for."""
    import jax

    from stackwise_jax.bench import kernels
    from stackwise_jax.bench.random_rack import block_bytes
    from stackwise_jax.memory import budget
    from stackwise_jax.train.plan import make_plan, phase_device_bytes

    plan = make_plan(config, None)
    step = make_step(config)
    seconds, loss = step.time(steps, warmup=WARMUP_STEPS)
    text = kernels.as_text(kernels.trace_kernels(step.run, "")) + "\n" if with_profile else ""
    stats = jax.local_devices()[0].memory_stats()
    model, stacks, item = config.model, step.frozen["frozen_stacks"], budget.item_bytes(config.precision.compute)
    trained, moments = (budget.tree_bytes(tree["adapters"]) for tree in (step.state.params, step.state.optimizer))
    figures = Figures(
        step_seconds=seconds,
        first_seconds=step.compile_seconds,
        loss=loss,
        flops=4.0 * model.n_blocks * budget.block_parameters(model) * plan.tokens_per_step,
        peak_bytes=stats["peak_bytes_in_use"] if stats else None,
        planned_bytes=phase_device_bytes(plan, len(plan.phases) - 1).total,
        rack_bytes=block_bytes({"stacks": stacks}),
        boundary_bytes=(len(stacks) + 1) * plan.tokens_per_step * model.d_model * item,
        adapter_bytes=2 * trained + moments,
    )
    return figures, text


def make_step(config: RunConfig) -> CompiledStep:
    """The train step of the last phase of a config over a random rack, after its first run."""
    import jax
    import numpy as np

    from stackwise_jax.bench.random_rack import random_rack
    from stackwise_jax.train.branches import Compiled, update_order
    from stackwise_jax.train.curriculum import make_curriculum
    from stackwise_jax.train.phases import signature
    from stackwise_jax.train.program import Program
    from stackwise_jax.train.scaling import init_scaling
    from stackwise_jax.train.state import Frozen, PartSource, joined, part_names
    from stackwise_jax.train.trunk import Forward
    from stackwise_jax.types import Vocabulary

    vocabulary = Vocabulary(config.model.vocab_size, mask_id=0, special_ids=())
    program = Program(config, vocabulary, config.training.batch_size)
    phases = make_curriculum(config)
    phase, branch = phases[-1], phases[-1].main
    sig = signature(phase, branch, phases, config)
    rack = random_rack(config, merged=False)
    frozen = {"frozen_stacks": rack["stacks"]} | ({"head": rack["head"]} if "head" not in branch.live_names else {})
    parts = PartSource(config, program.key).begin(phase, {}, Frozen(), head_has_table=sig.head_has_table)
    state = joined(parts, part_names(phase), init_scaling(config))
    train_step, embed, embedding = Compiled(program).step(sig), Forward(program).embed, rack["embedding"]

    def with_embedding(state: Any, frozen: Any, batch: Any, _: None, *numbers: Any) -> Any:
        """A step as the loop takes it, the settled embedding on the device beside it."""
        scalars = program.placement.to_small(*numbers)
        return train_step(state, frozen, batch, embed(branch.task, embedding, batch), *scalars)

    fractions = np.ones(len(update_order(branch)), np.float32)
    batch = jax.device_put(random_batch(config))
    step = CompiledStep(with_embedding, state, frozen, batch, None, fractions, compile_seconds=0.0)
    started = time.perf_counter()
    jax.block_until_ready(step.run())
    step.compile_seconds = time.perf_counter() - started
    return step
