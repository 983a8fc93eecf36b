"""The train step of a phase, compiled and timed on random numbers: what benchmarks of steps have in common."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

from stackwise_jax.errors import UserError
from stackwise_jax.schema import RunConfig

WARMUP_STEPS = 5
MATMUL = (16384, 8192, 28672)  # rows, contracted, columns of the matmul that shares are of


@dataclasses.dataclass
class CompiledStep:
    """A compiled train step with everything that it is called with."""

    compiled: Any
    state: Any
    frozen: Any
    batch: Any
    activations: Any
    fractions: Any
    compile_seconds: float
    index: int = 0

    def run(self) -> Any:
        """One update; returns its metrics, still on their way."""
        import numpy as np

        arguments = (self.frozen, self.batch, self.activations, self.fractions, np.int32(self.index))
        self.state, metrics = self.compiled(self.state, *arguments)
        self.index += 1
        return metrics

    def time(self, steps: int, warmup: int = WARMUP_STEPS) -> tuple[float, float]:
        """(median seconds a step, the last loss) of `steps` after `warmup` more.

        Every step is issued before the one ahead of it is waited for, as the loop does, so that the device never idles.
        """
        import jax
        import numpy as np

        pending: Any = None
        ends = []
        for _ in range(warmup + steps + 1):
            metrics = self.run()
            if pending is not None:
                jax.block_until_ready(pending)
                ends.append(time.perf_counter())
            pending = metrics
        loss = float(pending["loss"])
        ends.append(time.perf_counter())
        return statistics.median(np.diff(ends)[warmup:].tolist()), loss

    def profile(self) -> str:
        """The kernels of a step, as text."""
        import jax

        from stackwise_jax.bench import kernels

        for _ in range(WARMUP_STEPS):
            jax.block_until_ready(self.run())
        return kernels.as_text(kernels.trace_kernels(self.run, self.compiled.as_text()))


def compile_step(
    config: RunConfig, index: int = 0, make_gradients: Callable[..., Callable[..., Any]] | None = None
) -> CompiledStep:
    """Compiles the fused train step of phase `index` of a config, for random tokens and activations.

    Args:
      make_gradients: as `train.step.make_gradients`, which stands for None.

    Raises:
      UserError: an implementation that is named cannot serve, or the path has frozen stacks in its body.
      jax.errors.JaxRuntimeError: out of memory.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from stackwise_jax.train import step as train
    from stackwise_jax.train.branches import update_order
    from stackwise_jax.train.curriculum import make_curriculum
    from stackwise_jax.train.phases import Role, signature
    from stackwise_jax.train.program import Program
    from stackwise_jax.train.scaling import init_scaling
    from stackwise_jax.train.state import Frozen, PartSource, joined, part_names
    from stackwise_jax.types import Vocabulary

    vocabulary = Vocabulary(config.model.vocab_size, mask_id=0, special_ids=(0,))
    program = Program(config, vocabulary, config.training.batch_size)
    phases = make_curriculum(config)
    phase = phases[index]
    branch, sig = phase.main, signature(phase, phase.main, phases, config)
    if any(role is not Role.LIVE for _, role in branch.body):
        raise UserError(f"phase {phase.name} has frozen stacks in its path; this benchmark is of live ones")
    source, has_table = PartSource(config, program.key), sig.head_has_table
    state = joined(source.begin(phase, {}, Frozen(), head_has_table=has_table), part_names(phase), init_scaling(config))
    frozen: dict[str, Any] = {"frozen_stacks": []}
    settled = {"head": branch.head, "embedding": None if has_table else branch.embedding}
    frozen |= {name: source.fresh(name, has_table)[0] for name, role in settled.items() if role is Role.FROZEN}
    activations = None
    if branch.reads_activations:
        shape = (config.training.batch_size, config.data.seq_len, config.model.d_model)
        activations = jax.random.normal(program.key, shape, jnp.float32).astype(program.dtype)
    fractions = np.ones(len(update_order(branch)), np.float32)
    batch = jax.device_put(random_batch(config))
    started = time.perf_counter()
    gradients = (make_gradients or train.make_gradients)(program, sig)
    update: Any = train.make_update(program, sig, gradients)
    compiled = update.lower(state, frozen, batch, activations, fractions, np.int32(0)).compile()
    return CompiledStep(compiled, state, frozen, batch, activations, fractions, time.perf_counter() - started)


def random_batch(config: RunConfig) -> Any:
    """Rows of random tokens: one document each, or about four where documents are kept apart."""
    import numpy as np

    from stackwise_jax.types import Batch

    B, T = config.training.batch_size, config.data.seq_len
    draw = np.random.default_rng(0)
    starts = draw.random((B, T)) < (4 / T if config.data.isolate_documents else 0.0)
    starts[:, 0] = True
    places = np.arange(T)[None, :]
    first = np.maximum.accumulate(np.where(starts, places, 0), axis=1)
    return Batch(
        tokens=draw.integers(config.model.vocab_size, size=(B, T), dtype=np.int32),
        segments=np.cumsum(starts, axis=1, dtype=np.int32),
        positions=(places - first).astype(np.int32),
        row_ids=np.arange(B, dtype=np.int32),
        visits=np.zeros(B, np.int32),
    )


def program_bytes(compiled: Any) -> int | None:
    """Device memory of a compiled step: its arguments, its results and what it needs in between."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes


def matmul_flops(kind: str, repeats: int = 20) -> float | None:
    """FLOP/s of a large matmul with inputs in bf16 or fp8 on this device: what can be reached; None on a CPU."""
    import jax
    import jax.numpy as jnp

    if jax.default_backend() == "cpu":
        return None
    dtype = {"bf16": jnp.bfloat16, "fp8": jnp.float8_e4m3fn}[kind]
    M, K, N = MATMUL
    keys = jax.random.split(jax.random.key(0))
    shapes = ((M, K), (K, N))
    left, right = (jax.random.normal(*of, jnp.bfloat16).astype(dtype) for of in zip(keys, shapes, strict=True))
    multiply = jax.jit(lambda a, b: jax.lax.dot(a, b, preferred_element_type=jnp.bfloat16))
    seconds = 0.0
    for _ in range(2):  # the first time to wake the device, whose clock is slow when it has idled
        started = time.perf_counter()
        jax.block_until_ready([multiply(left, right)[0, 0] for _ in range(repeats)])
        seconds = time.perf_counter() - started
    return 2.0 * M * K * N * repeats / seconds
