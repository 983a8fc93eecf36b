"""Measures a trained run on its own held-out text or on any other, from the run folder alone; writes nothing.

    python -m stackwise_jax.evaluate --workdir=runs/quickstart
    python -m stackwise_jax.evaluate --workdir=runs/quickstart --source="notes/**/*.txt" --rows=256
    python -m stackwise_jax.evaluate --workdir=runs/masked --order=left_to_right --rows=32
    python -m stackwise_jax.evaluate --workdir=runs/quickstart --exit=0.5,0.9

Without --source: the held-out rows that training measured, out of the prepared corpus. With it: those documents, packed
into rows as in training, by the run's own tokenizer. A diffusion run is measured by its bound; --order asks a run that
was trained at all masked fractions for the exact likelihood in that order, at one network evaluation a token. --exit
asks what is lost and saved where places leave after the first stack whose head is so sure of them.
"""

import dataclasses
import functools
import math
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from stackwise_jax.errors import UserError, did_you_mean
from stackwise_jax.evals.bound import FLOOR, Edges, Likelihood, Piece, Rows, diffusion_bound, is_whole, level_losses
from stackwise_jax.evals.likelihood import RowLosses, held_out_loss
from stackwise_jax.evals.orders import ORDERS, order_likelihood
from stackwise_jax.generate import exits
from stackwise_jax.generate.denoise import RackDenoiser
from stackwise_jax.generate.depth import Depth, depth_of, make_band_denoisers
from stackwise_jax.memory.placement import start_backend
from stackwise_jax.memory.precision import DTYPES
from stackwise_jax.models.rack import apply_rack, output_table
from stackwise_jax.objectives.objective import tasks
from stackwise_jax.objectives.places import eligible_places
from stackwise_jax.ops.loss import token_losses
from stackwise_jax.schema import DataConfig, RunConfig
from stackwise_jax.train.program import make_program
from stackwise_jax.train.trained import Trained, load_trained
from stackwise_jax.types import Batch, Params, Vocabulary

DRAWS = 8  # masks a row and band, where --draws does not say
EVALUATION_STREAM = 5  # of the run's key (models/rack.py uses 0 to 2, train/step.py 3 and 4)


def make_options() -> flags.FlagValues:
    """The flags of this program."""
    options = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "The run folder.", flag_values=options)
    source_help = "Files and globs, or embedded. Default: the run's held-out rows."
    flags.DEFINE_string("source", None, source_help, flag_values=options)
    rows_help = "Rows measured, at most. Default: evaluation.rows of the run; with --source all."
    flags.DEFINE_integer("rows", None, rows_help, lower_bound=1, flag_values=options)
    flags.DEFINE_integer("stacks", None, "Read only the first stacks.", lower_bound=1, flag_values=options)
    entry_help = "Stack that the embedding is handed to, from 0; those left of it are left out."
    flags.DEFINE_integer("entry", 0, entry_help, lower_bound=0, flag_values=options)
    objective_help = "Of a run that was trained on several: which one to measure. Default: the first."
    flags.DEFINE_string("objective", None, objective_help, flag_values=options)
    order_help = f"Exact likelihood of a masked run, place by place: {', '.join(ORDERS)}."
    flags.DEFINE_string("order", None, order_help, flag_values=options)
    draws_help = f"Masks a row and band of a bound. Default: {DRAWS}."
    flags.DEFINE_integer("draws", None, draws_help, lower_bound=1, flag_values=options)
    form_help = "How the bands of a run whose time is depth are run: as trained, or step_local."
    flags.DEFINE_string("form", None, form_help, flag_values=options)
    exit_help = 'Probabilities from which a place leaves early, such as "0.5,0.9".'
    flags.DEFINE_string("exit", None, exit_help, flag_values=options)
    return options


def main(options: Any) -> None:
    """Prints a small table."""
    workdir = required_workdir(options)
    start_backend()
    thresholds = None if options.exit is None else exits.parse_thresholds(options.exit)
    trained = load_trained(workdir, n_stacks=options.stacks, entry=options.entry, merged=thresholds is None)
    state = "finished" if trained.finished else "not finished"
    print(f"run {workdir}: {trained.n_stacks} stack(s), {trained.step} steps, {state}")
    print(f"text: {options.source or 'the held-out rows of the run'}")
    how = {name: options[name].value for name in ("source", "rows", "objective", "order", "draws", "form")}
    if thresholds is None:
        print(describe(evaluate(trained, **how)))
        return
    if given := [name for name in ("order", "draws", "form") if how[name] is not None]:
        raise UserError(f"--{given[0]} does not go with --exit; leave one of them out")
    trained = dataclasses.replace(trained, config=_config_of(trained.config, options.objective))
    batches = _batches(trained, options.source, options.rows)
    print(exits.describe_exits(exits.measure_exits(trained, batches, thresholds)))


def describe(result: dict[str, Any]) -> str:
    """What `evaluate` found, a line a figure, then a line a band."""
    lines = [
        f"{name.replace('_', ' '):<21} {value:,.{0 if name == 'tokens' else 4}f}"
        for name, value in result.items()
        if name != "bands"
    ]
    if "bands" in result:
        with_loss = "loss" in result["bands"][0]
        lines += ["", f"{'masked fraction':<21}" + "      loss" * with_loss + "  masked cross-entropy  standard error"]
    for band in result.get("bands", []):
        edges = f"{band['low']:g} to {band['high']:g}" if band["low"] < band["high"] else f"{band['low']:g}"
        loss = f"{band['loss']:10.4f}" if "loss" in band else ""
        lines.append(f"{edges:<21}{loss}{band['masked_cross_entropy']:22.4f}{band['standard_error']:16.4f}")
    return "\n".join(lines)


def evaluate(
    trained: Trained,
    *,
    source: str | None,
    rows: int | None,
    objective: str | None = None,
    order: str | None = None,
    draws: int | None = None,
    form: str | None = None,
) -> dict[str, Any]:
    """Measures a rack.

    Args:
      source: as `data.source`; None: the run's held-out rows, whose text must still be there.
      rows: at most; None: those of the run, or all of the source.
      objective: of those that the run was trained on; None: the first.
      order: of `evals.orders.ORDERS`: the exact likelihood in that order.
      draws: masks a row and band of a diffusion run.
      form: how bands are run, see `depth_of`.

    Returns:
      what `held_out_loss` does; of a diffusion run, or with an order: loss (nats a token), bits_per_byte, tokens,
      standard_error, bits_per_byte_error, and perplexity_bound of a bound or perplexity of an order. `bands`, of a run
      whose time is depth: of each its edges low and high, loss (its part of the bound), standard_error,
      masked_cross_entropy, and the masked tokens that were drawn. A diffusion run that was not trained at all masked
      fractions has no loss: masked_cross_entropy and standard_error (where its time is depth, in `bands`) and tokens.

    Raises:
      UserError: see `iterate_documents`, `prepare_corpus` and `depth_of`; the run's text is no longer what it was
        trained on; nothing in the text is scored; a measure that the run does not have.
    """
    config = _config_of(trained.config, objective)
    trained = dataclasses.replace(trained, config=config)
    depth = depth_of(config, trained.rack, trained.tap, form=form)
    _check_measure(config, depth, order, draws)
    batches = _batches(trained, source, rows)
    if order is not None or _is_drawn(config, depth):
        result = _masked_figures(trained, batches, depth, order, draws or DRAWS)
    else:
        row_losses, target_bytes = _measures(trained)
        is_likelihood = config.objective.name in ("clm", "prefix")
        result = held_out_loss(row_losses, batches, target_bytes=target_bytes if is_likelihood else None)
    if not result["tokens"]:
        raise UserError(f"--source={source} has no token that the run's objective asks for; give more text")
    return result


def _config_of(config: RunConfig, objective: str | None) -> RunConfig:
    """The config with one of its objectives, and the attention that goes with it."""
    known = {task.objective: task for task, _ in tasks(config.objective, config.model.attention)}
    if objective is not None and objective not in known:
        raise UserError(f"--objective={objective}: the run was trained on {', '.join(known)}")
    if config.objective.name != "mixed":
        return config
    task = known[objective] if objective else next(iter(known.values()))
    own = dataclasses.replace(config.objective, name=task.objective, mixture="")
    return dataclasses.replace(config, objective=own, model=dataclasses.replace(config.model, attention=task.attention))


def _is_drawn(config: RunConfig, depth: Depth | None) -> bool:
    """Whether the run is measured by masks drawn here: the bound, or the cross-entropy of its bands."""
    return config.objective.name == "diffusion" or depth is not None


def _check_measure(config: RunConfig, depth: Depth | None, order: str | None, draws: int | None) -> None:
    """Refuses what the run has no number for."""
    objective = config.objective
    if order is not None:
        if order not in ORDERS:
            raise UserError(f"--order={order} must be one of: {', '.join(ORDERS)}.{did_you_mean(order, ORDERS)}")
        if objective.name not in ("mlm", "diffusion"):
            raise UserError(
                f"--order={order} is for runs that unmask places in any order, and this one has objective.name="
                f"{objective.name!r}; leave it out"
            )
        bands = _bands(config, depth)
        if not is_whole(bands):
            rates = ", ".join(f"{low:g}" if low == high else f"{low:g} to {high:g}" for low, high in bands)
            raise UserError(
                f"--order={order}: a likelihood takes all masked fractions from {FLOOR:g} to 1, and this run was "
                f"trained at {rates}; leave it out, and its masked cross-entropy is measured"
            )
    if draws is not None and (order is not None or not _is_drawn(config, depth)):
        other = f"--order={order}" if order is not None else f"objective.name={objective.name!r}"
        raise UserError(f"--draws={draws} is for the bound of a diffusion run, not for {other}; leave it out")


def _bands(config: RunConfig, depth: Depth | None) -> Sequence[Edges]:
    """The masked fractions of each denoiser of the run."""
    low, high = config.objective.rate_min, config.objective.rate_max
    return ((typing.cast(float, low), typing.cast(float, high)),) if depth is None else depth.bands


def _masked_figures(
    trained: Trained, batches: Iterable[Batch], depth: Depth | None, order: str | None, draws: int
) -> dict[str, Any]:
    """The bound, the likelihood in an order, or masked cross-entropy where there is neither; see `evaluate`."""
    bands, tokenizer = _bands(trained.config, depth), trained.tokenizer
    pieces = _pieces(trained, batches, depth)
    key = jax.random.fold_in(jax.random.key(trained.config.seed), EVALUATION_STREAM)
    options: dict[str, Any] = {"mask_id": tokenizer.mask_id, "key": key}
    if order is not None:
        exact = order_likelihood(pieces, order, bands=bands, piece_bytes=tokenizer.piece_bytes, **options)
        return _figures(exact, "perplexity")
    if is_whole(bands):
        bound = diffusion_bound(pieces, bands, piece_bytes=tokenizer.piece_bytes, draws=draws, **options)
        found = _figures(bound, "perplexity_bound")
        return found if depth is None else found | {"bands": [dataclasses.asdict(band) for band in bound.bands]}
    levels = level_losses(pieces, bands, draws=draws, **options)
    if depth is None:
        (only,) = levels
        figures = {"masked_cross_entropy": only.masked_cross_entropy, "standard_error": only.standard_error}
        return figures | {"tokens": float(only.tokens)}
    found = [{name: value for name, value in dataclasses.asdict(level).items() if name != "loss"} for level in levels]
    return {"tokens": float(sum(level.tokens for level in levels)), "bands": found}


def _figures(found: Likelihood, perplexity: str) -> dict[str, float]:
    return {
        "loss": found.loss,
        "standard_error": found.standard_error,
        perplexity: math.exp(min(found.loss, 700.0)),
        "bits_per_byte": found.bits_per_byte,
        "bits_per_byte_error": found.bits_per_byte_error,
        "tokens": float(found.tokens),
    }


def _pieces(trained: Trained, batches: Iterable[Batch], depth: Depth | None) -> Iterator[Piece]:
    """Rows whose logits may exist at once, with the run's denoisers for them."""
    config, tokenizer = trained.config, trained.tokenizer
    vocabulary = Vocabulary(tokenizer.vocab_size, tokenizer.mask_id, tuple(tokenizer.special_ids))
    common = {"mask_id": tokenizer.mask_id, "pad_id": tokenizer.pad_id, "dtype": DTYPES[config.precision.compute]}
    common["shift"] = config.objective.shift
    if depth is None:
        denoisers = (RackDenoiser(trained.rack, config.model, **common),)
    else:
        denoisers = make_band_denoisers(
            trained.rack, config.model, depth.stacks, form=depth.form, heads=depth.heads, **common
        )
    for batch in batches:
        size, length = batch.tokens.shape
        most = max(1, config.training.loss_chunk_tokens // length)
        together = max(n for n in range(1, most + 1) if size % n == 0)
        for first in range(0, size, together):
            own = jax.tree.map(lambda leaf, first=first, end=first + together: leaf[first:end], batch)
            eligible = np.asarray(eligible_places(own, vocabulary, shift=config.objective.shift))
            rows = Rows(own.tokens, eligible, own.row_ids)
            packing = {"segments": own.segments, "positions": own.positions}
            yield rows, tuple(dataclasses.replace(denoiser, **packing) for denoiser in denoisers)


def _batches(trained: Trained, source: str | None, rows: int | None) -> Iterator[Batch]:
    """The rows of a source, or the run's own where there is none."""
    if source is None:
        return _own_batches(trained, rows)
    data, size = trained.config.data, trained.config.training.batch_size
    return source_batches(source, trained.tokenizer, data, batch_size=size, rows=rows)


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
    task = program.task
    corrupt = jax.jit(functools.partial(program.corrupt, task))

    @jax.jit
    def measure(rack: Params, batch: Batch) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
        example = program.corrupt(task, batch)
        context = program.context(task, example, rack["embedding"])
        hidden = apply_rack(rack, example.inputs, context, config.model, dtype=program.dtype)
        table = output_table(rack["head"], rack["embedding"]).astype(program.dtype)
        losses = token_losses(
            hidden.reshape(-1, hidden.shape[-1]),
            table,
            example.targets.reshape(-1),
            chunk_tokens=config.training.loss_chunk_tokens,
        )
        asked = (example.weights > 0).astype(jnp.float32)
        return jnp.sum(asked * losses.reshape(asked.shape), 1), jnp.sum(asked, 1)

    together = config.training.batch_size // config.training.accumulation_steps  # rows that a step has on the device

    def row_losses(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        pieces = [
            jax.tree.map(lambda leaf, first=first: leaf[first : first + together], batch)
            for first in range(0, len(batch.tokens), together)
        ]
        losses, weights = zip(*(measure(trained.rack, piece) for piece in pieces), strict=True)
        return np.concatenate(losses), np.concatenate(weights)

    def target_bytes(batch: Batch) -> int:
        example = corrupt(batch)
        return tokenizer.scored_bytes(np.asarray(example.targets), np.asarray(example.weights))

    return row_losses, target_bytes


if __name__ == "__main__":
    run_command(main, make_options(), __doc__ or "")
