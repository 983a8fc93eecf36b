"""One row of a comparison, in a process of its own: its memory is then its own, and its failure too."""

import dataclasses
import json
import re
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from stackwise_jax import config as config_lib
from stackwise_jax.errors import one_line_errors
from stackwise_jax.schema import RunConfig

RESULT = "result.json"


def run_row(config: RunConfig, workdir: Path) -> dict[str, Any]:
    """Trains a row to its end, or continues it, and writes what came out to `result.json` in its run folder.

    Returns:
      what is written: config; steps, tokens, flops; `phases`: for each kind (embedding, stack, end_to_end) the median
      tokens_per_second and mfu of its training steps, where they are known; `held_out`: after every phase nats a token
      (loss) and bits_per_byte; `final`: the same of the finished rack, of masked diffusion the bound with its
      standard_error; block_state_bytes: weights, moments and gradients of live blocks, in the phase that has most;
      peak_bytes of device memory over the life of the process (None: the backend does not
      say); wall_seconds of training with its evaluations, caches and snapshots, compilation included.
    """
    import jax

    from stackwise_jax.data.corpus import prepare_corpus
    from stackwise_jax.evaluate import evaluate
    from stackwise_jax.memory.placement import start_backend
    from stackwise_jax.train import loop
    from stackwise_jax.train.trained import load_trained

    start_backend()
    corpus = prepare_corpus(config, report=lambda line: print(line, file=sys.stderr, flush=True))
    started = time.perf_counter()
    result = loop.run(config, corpus, workdir, say=lambda _: None)
    wall_seconds = time.perf_counter() - started
    steps = sum(phase.steps for phase in result.plan.phases)
    memory = jax.local_devices()[0].memory_stats()
    final = list(result.held_out.values())[-1]
    if config.objective.name == "diffusion":
        final = evaluate(load_trained(workdir), source=None, rows=None)
    found = {
        "config": dataclasses.asdict(config),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "steps": steps,
        "tokens": steps * result.plan.tokens_per_step,
        "flops": result.plan.flops,
        "phases": phase_rates(workdir / "metrics.jsonl"),
        "held_out": result.held_out,
        "final": final,
        "block_state_bytes": block_state_bytes(result.plan),
        "peak_bytes": memory["peak_bytes_in_use"] if memory else None,
        "wall_seconds": wall_seconds,
    }
    (workdir / RESULT).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def block_state_bytes(plan: Any) -> int:
    """Weights, moments and gradients of live blocks, by the plan, in the phase that has most of them."""
    from stackwise_jax.memory import budget
    from stackwise_jax.train.phases import stack_sizes

    config, sizes = plan.config, stack_sizes(plan.config)
    blocks = max(sum(sizes[stack] for stack in phase.live_stacks) for phase in plan.phases)
    live = blocks * budget.block_parameters(config.model)
    weights, gradients = budget.weight_and_gradient_bytes(config, live=live, live_in_stacks=live)
    return weights + gradients + budget.optimizer_bytes(config, live=live, live_in_stacks=live)


def phase_rates(metrics: Path) -> dict[str, dict[str, float]]:
    """Median tokens_per_second and mfu of the training lines of every kind of phase."""
    rates: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for text in metrics.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        kind = re.sub(r"[_\d]+$", "", str(line.get("phase", "")))
        for name in ("tokens_per_second", "mfu"):
            if line["kind"] == "train" and name in line:
                rates[kind][name].append(line[name])
    return {kind: {name: statistics.median(values) for name, values in of.items()} for kind, of in rates.items()}


def main(argv: list[str]) -> None:
    """Runs the row whose config (JSON) and run folder are the two arguments."""
    with one_line_errors():
        run_row(config_lib.resolve(json.loads(argv[1])), Path(argv[2]))


if __name__ == "__main__":
    main(sys.argv)
