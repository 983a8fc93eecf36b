"""Measures a trained run on its own held-out text or on any other, from the run folder alone; writes nothing.

    python -m stackwise_jax.evaluate --workdir=runs/quickstart
    python -m stackwise_jax.evaluate --workdir=runs/quickstart --source="notes/**/*.txt" --rows=256

Without --source: the held-out rows that training measured, out of the prepared corpus. With it: those documents, packed
into rows as in training, by the run's own tokenizer.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Array, Float, Int32

from stackwise_jax.command import required_workdir, run_command
from stackwise_jax.data.corpus import prepare_corpus
from stackwise_jax.data.sources import iterate_documents
from stackwise_jax.data.split import segments_and_positions
from stackwise_jax.data.tokenizer import Tokenizer
from stackwise_jax.errors import UserError
from stackwise_jax.evals.likelihood import RowLosses, held_out_loss
from stackwise_jax.memory.placement import start_backend
from stackwise_jax.models.rack import apply_rack, output_table
from stackwise_jax.ops.loss import token_losses
from stackwise_jax.schema import DataConfig
from stackwise_jax.train.step import make_program
from stackwise_jax.train.trained import Trained, load_trained
from stackwise_jax.types import Batch, Params


def make_options() -> flags.FlagValues:
    """The flags of this program."""
    options = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "The run folder.", flag_values=options)
    source_help = "Files and globs, or embedded. Default: the run's held-out rows."
    flags.DEFINE_string("source", None, source_help, flag_values=options)
    rows_help = "Rows measured, at most. Default: evaluation.rows of the run; with --source all."
    flags.DEFINE_integer("rows", None, rows_help, lower_bound=1, flag_values=options)
    flags.DEFINE_integer("stacks", None, "Read only the first stacks.", lower_bound=1, flag_values=options)
    return options


def main(options: Any) -> None:
    """Prints a small table."""
    workdir = required_workdir(options)
    start_backend()
    trained = load_trained(workdir, n_stacks=options.stacks)
    state = "finished" if trained.finished else "not finished"
    print(f"run {workdir}: {len(trained.rack['stacks'])} stack(s), {trained.step} steps, {state}")
    print(f"text: {options.source or 'the held-out rows of the run'}")
    for name, value in evaluate(trained, source=options.source, rows=options.rows).items():
        print(f"{name.replace('_', ' '):<21} {value:,.{0 if name == 'tokens' else 4}f}")


def evaluate(trained: Trained, *, source: str | None, rows: int | None) -> dict[str, float]:
    """Measures a rack; returns what `held_out_loss` does.

    Args:
      source: as `data.source`; None: the run's held-out rows, whose text must still be there.
      rows: at most; None: those of the run, or all of the source.

    Raises:
      UserError: see `iterate_documents` and `prepare_corpus`; the run's text is no longer what it was trained on;
        nothing in the text is scored.
    """
    config = trained.config
    if source is None:
        batches = _own_batches(trained, rows)
    else:
        size = config.training.batch_size
        batches = source_batches(source, trained.tokenizer, config.data, batch_size=size, rows=rows)
    row_losses, target_bytes = _measures(trained)
    result = held_out_loss(row_losses, batches, target_bytes=target_bytes if config.objective.name == "clm" else None)
    if not result["tokens"]:
        raise UserError(f"--source={source} has no token that the run's objective asks for; give more text")
    return result


def source_batches(
    source: str, tokenizer: Tokenizer, data: DataConfig, *, batch_size: int, rows: int | None
) -> Iterator[Batch]:
    """Packs documents into rows of `data.seq_len` as a prepared corpus does, one batch in memory at a time.

    The last batch is filled up with rows of padding, which nothing scores.
    """
    left = None if rows is None else rows * data.seq_len
    tokens, row = np.zeros(0, np.int32), 0
    for document in iterate_documents(source, text_field=data.text_field, max_bytes=None, tfds_dir=data.tfds_dir):
        ids = [[tokenizer.bos_id], tokenizer.encode(document), [tokenizer.eos_id]]
        tokens = np.concatenate([tokens, *ids]).astype(np.int32)
        while len(tokens) >= (size := min(batch_size * data.seq_len, left or batch_size * data.seq_len)):
            yield _packed(tokens[:size], tokenizer, data, batch_size, row)
            tokens, row = tokens[size:], row + batch_size
            left = None if left is None else left - size
            if left == 0:
                return
    if len(tokens):
        yield _packed(tokens, tokenizer, data, batch_size, row)


def _packed(
    tokens: Int32[np.ndarray, "n"], tokenizer: Tokenizer, data: DataConfig, batch_size: int, first_row: int
) -> Batch:
    """One batch of consecutive `tokens`, and padding after them."""
    filled = np.full(batch_size * data.seq_len, tokenizer.pad_id, np.int32)
    filled[: len(tokens)] = tokens
    rows = filled.reshape(batch_size, data.seq_len)
    starts = rows == tokenizer.bos_id if data.isolate_documents else None
    segments, positions = segments_and_positions(rows != tokenizer.pad_id, starts)
    row_ids = np.arange(first_row, first_row + batch_size, dtype=np.int32)
    return Batch(rows, segments, positions, row_ids, np.zeros(batch_size, np.int32))


def _own_batches(trained: Trained, rows: int | None) -> Iterator[Batch]:
    """The rows that training measured."""
    from stackwise_jax.data.pipeline import validation_batches

    config = trained.config
    try:
        corpus = prepare_corpus(config, report=lambda line: print(line, file=sys.stderr, flush=True))
    except UserError as error:
        raise UserError(f"the run's own text cannot be opened: {error}; or give other text with --source") from None
    if corpus.digest != trained.corpus_digest:
        data = config.data
        named = f"data.prepared={data.prepared!r}" if data.prepared else f"data.source={data.source!r}"
        raise UserError(
            f"{named} is not the text that the run was trained on: it has changed since; "
            "restore it, or give other text with --source"
        )
    return validation_batches(
        corpus.validation,
        batch_size=config.training.batch_size,
        rows=config.evaluation.rows if rows is None else rows,
        isolate_documents=config.data.isolate_documents,
    )


def _measures(trained: Trained) -> tuple[RowLosses, Callable[[Batch], int]]:
    """The rack as a function from a batch to its rows' losses; and the bytes that a batch's targets stand for."""
    config, tokenizer = trained.config, trained.tokenizer
    # Held-out rows are seen in their first variant alone, whose rates do not depend on the number of rows.
    program = make_program(config, tokenizer, n_rows=1)
    corrupt = jax.jit(lambda batch: program.corrupt(program.mask_key, batch))

    @jax.jit
    def measure(rack: Params, batch: Batch) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
        example = program.corrupt(program.mask_key, batch)
        hidden = apply_rack(rack, example.inputs, program.context(example), config.model, dtype=program.dtype)
        table = output_table(rack["head"], rack["embedding"]).astype(program.dtype)
        losses = token_losses(
            hidden.reshape(-1, hidden.shape[-1]),
            table,
            example.targets.reshape(-1),
            chunk_tokens=config.training.loss_chunk_tokens,
        )
        return jnp.sum(example.weights * losses.reshape(example.weights.shape), 1), jnp.sum(example.weights, 1)

    def row_losses(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        losses, weights = measure(trained.rack, batch)
        return np.asarray(losses), np.asarray(weights)

    def target_bytes(batch: Batch) -> int:
        example = corrupt(batch)
        return tokenizer.scored_bytes(np.asarray(example.targets), np.asarray(example.weights))

    return row_losses, target_bytes


if __name__ == "__main__":
    run_command(main, make_options(), __doc__ or "")
