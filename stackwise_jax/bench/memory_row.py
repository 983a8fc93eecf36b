"""One pair of `bench memory`, in a process of its own: a short run on random tokens, and its allocator's peak."""

import json
import sys
from pathlib import Path
from typing import Any

from stackwise_jax import config as config_lib
from stackwise_jax.errors import UserError, one_line_errors
from stackwise_jax.schema import RunConfig

_TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"]
_PIECES = 300  # of the tokenizer, which says which ids are special and is used for nothing else


def random_corpus(config: RunConfig) -> Any:
    """A corpus of `data.max_rows` rows of random tokens, and one batch of held-out ones, in memory."""
    import numpy as np

    from stackwise_jax.data.corpus import Corpus
    from stackwise_jax.data.split import Part, Split
    from stackwise_jax.data.tokenizer import open_tokenizer, train_tokenizer

    tokenizer = open_tokenizer(train_tokenizer(_TEXT, _PIECES))
    draw, first = np.random.default_rng(config.seed), max(tokenizer.special_ids) + 1

    def split(n_rows: int) -> Split:
        tokens = draw.integers(first, tokenizer.vocab_size, size=(n_rows, config.data.seq_len), dtype=np.uint16)
        starts = draw.random(tokens.shape) < 4 / config.data.seq_len
        starts[:, 0] = True
        tokens[starts] = tokenizer.bos_id
        part = Part(0, n_rows, tokens.size, int(starts.sum()), tokens.size, 1)
        return Split(tokens, tokenizer.bos_id, tokenizer.pad_id, (part,), n_rows, f"random {n_rows}")

    assert config.data.max_rows is not None
    train, held_out = split(config.data.max_rows), split(config.evaluation.rows)
    return Corpus(Path(), f"random {config.seed}", config.data.seq_len, tokenizer, train, held_out)


def run_row(config: RunConfig, workdir: Path) -> dict[str, Any]:
    """Runs a pair to its end.

    Returns:
      planned, measured: bytes of the device; phase: that the plan has needing most.

    Raises:
      UserError: the device does not say what it holds.
    """
    import jax

    from stackwise_jax.memory.placement import start_backend
    from stackwise_jax.train import loop
    from stackwise_jax.train.machine import target_at_hand
    from stackwise_jax.train.needs import needs_of

    start_backend()
    device = jax.local_devices()[0]
    if not device.memory_stats():
        raise UserError(
            f"{device.device_kind} has no memory of its own to measure; --compiled compares with the compiler's count"
        )
    result = loop.run(config, random_corpus(config), workdir, say=lambda _: None)
    measured = device.memory_stats()["peak_bytes_in_use"]  # before the plan is counted anew, which takes none
    needs = needs_of(result.plan, target_at_hand())
    return {"planned": needs.device.total, "measured": measured, "phase": result.plan.phases[needs.phase].name}


def main(argv: list[str]) -> None:
    """Runs the pair whose config (JSON) and run folder are the two arguments; prints a line of JSON."""
    with one_line_errors():
        print(json.dumps(run_row(config_lib.resolve(json.loads(argv[1])), Path(argv[2]) / "run")), flush=True)


if __name__ == "__main__":
    main(sys.argv)
