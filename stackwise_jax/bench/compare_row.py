"""One row of a comparison, in a process of its own: its memory is then its own, and its failure too."""

import dataclasses
import json
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
      (loss) and bits_per_byte; peak_bytes of device memory over the life of the process (None: the backend does not
      say); wall_seconds of training with its evaluations, caches and snapshots, compilation included.
    """
    import jax

    from stackwise_jax.data.corpus import prepare_corpus
    from stackwise_jax.memory.placement import start_backend
    from stackwise_jax.train import loop

    start_backend()
    corpus = prepare_corpus(config, report=lambda line: print(line, file=sys.stderr, flush=True))
    started = time.perf_counter()
    result = loop.run(config, corpus, workdir, say=lambda _: None)
    wall_seconds = time.perf_counter() - started
    steps = sum(phase.steps for phase in result.plan.phases)
    memory = jax.local_devices()[0].memory_stats()
    found = {
        "config": dataclasses.asdict(config),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "steps": steps,
        "tokens": steps * result.plan.tokens_per_step,
        "flops": result.plan.flops,
        "phases": phase_rates(workdir / "metrics.jsonl"),
        "held_out": result.held_out,
        "peak_bytes": memory["peak_bytes_in_use"] if memory else None,
        "wall_seconds": wall_seconds,
    }
    (workdir / RESULT).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def phase_rates(metrics: Path) -> dict[str, dict[str, float]]:
    """Median tokens_per_second and mfu of the training lines of every kind of phase."""
    rates: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for text in metrics.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        kind = "stack" if str(line.get("phase", "")).startswith("stack_") else line.get("phase")
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
