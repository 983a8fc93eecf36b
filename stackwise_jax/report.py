"""Trains a run and says what came out: held-out losses, baselines on the same tokens, samples, and what to do next.

What it prints beyond training is a function of the run folder, so a finished run prints it again without training.
"""

import dataclasses
import functools
import math
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int

from stackwise_jax import config as config_lib
from stackwise_jax.data.corpus import Corpus, Split, prepare_corpus
from stackwise_jax.data.pipeline import validation_batches
from stackwise_jax.evals.ngram import Pairs, ngram_scores
from stackwise_jax.generate.depth import depth_of
from stackwise_jax.generate.texts import continue_texts, printable
from stackwise_jax.memory import processes
from stackwise_jax.memory.placement import make_placement
from stackwise_jax.schema import ArchitectureConfig, RunConfig
from stackwise_jax.train import loop
from stackwise_jax.train.folder import refuse_foreign
from stackwise_jax.train.plan import make_plan
from stackwise_jax.train.program import make_program
from stackwise_jax.train.trained import read_tap, settled_rack

CONTROL_FOLDER = "control_one_block"
PIECE_ROWS = 4096
TITLES = {"clm": "held-out", "mlm": "held-out masked cross-entropy", "diffusion": "held-out diffusion loss"}
Rows = list[tuple[str, float, float | None]]
"""Lines of the table: what, nats per token, bits per byte or None."""


def train_and_report(config: RunConfig, workdir: Path) -> None:
    """Trains a run to its end, or continues it, and prints its report.

    Raises:
      UserError: see `prepare_corpus` and `loop.run`.
    """
    processes.start_processes(config.mesh)
    make_placement(config.mesh)  # refuses a mesh that there are no devices for
    with processes.only_first_speaks():
        _train_and_report(config, workdir)


def _train_and_report(config: RunConfig, workdir: Path) -> None:
    def prepare() -> Corpus:
        return prepare_corpus(config, report=lambda line: print(line, file=sys.stderr, flush=True))

    refuse_foreign(workdir, config)  # before hours may go into a corpus
    corpus = processes.first_before_others(prepare)
    result = loop.run(config, corpus, workdir)
    rows = _held_out_rows(result.held_out)
    if config.evaluation.ngrams:
        rows += ngram_rows(config, corpus)
    if config.evaluation.one_block_control and config.training.mode != "end_to_end":
        control = control_config(config, result.plan.flops)
        print("the control: one block, end to end, at equal FLOPs", file=sys.stderr, flush=True)
        control_result = loop.run(control, corpus, workdir / CONTROL_FOLDER, say=lambda _: None)
        label = f"control: one block end to end, {control.training.phase_budget}"
        rows += [(label, nats, bits) for _, nats, bits in _held_out_rows(control_result.held_out)[:1]]
    print()
    print(table(config, rows) if rows else "assembled; nothing was trained, and nothing measured yet")
    if config.generation.samples:
        print_samples(config, corpus, result)
    folder = shlex.quote(str(workdir))
    print()
    print(f'more text:     python -m stackwise_jax.generate --workdir={folder} --prompt="..."')
    print(f"more numbers:  python -m stackwise_jax.evaluate --workdir={folder}")
    print(f"run folder:    {workdir}")


def control_config(config: RunConfig, flops: float) -> RunConfig:
    """The same model with one block, trained end to end for as many steps as `flops` allow; at least one."""
    plain = config_lib.without_growth(config)
    progressive = dataclasses.replace(plain.training.progressive, enabled=False)
    training = dataclasses.replace(plain.training, mode="end_to_end", phase_budget="1 steps", progressive=progressive)
    control = dataclasses.replace(
        plain,
        name=f"{config.name}_control",
        model=dataclasses.replace(
            plain.model,
            ties_embedding=config.model.ties_embedding,
            architecture=ArchitectureConfig(n_stacks=1, blocks_per_stack=1),
        ),
        training=training,
        evaluation=dataclasses.replace(config.evaluation, every_steps=None, ngrams=False, one_block_control=False),
        generation=dataclasses.replace(config.generation, samples=0),
    )
    control = config_lib.resolve(dataclasses.asdict(control))
    steps = max(1, round(flops / make_plan(control, None).flops))
    return dataclasses.replace(control, training=dataclasses.replace(control.training, phase_budget=f"{steps} steps"))


def ngram_rows(config: RunConfig, corpus: Corpus) -> Rows:
    """Baselines on the tokens that the model is scored on; for masked places a bigram has nothing to read."""
    is_causal = config.objective.name == "clm"
    inputs, targets, weights = scored_tokens(config, corpus)
    training = training_pairs(corpus.train, isolate_documents=config.data.isolate_documents)
    scores = ngram_scores(training, inputs, targets, weights, corpus.tokenizer.vocab_size)
    if not is_causal:
        return [("unigram", scores.unigram, None)]
    n_bytes = corpus.tokenizer.scored_bytes(targets, weights)
    bits = float(weights.sum()) / math.log(2) / max(n_bytes, 1)  # per byte, of one nat a token
    named = {"unigram": scores.unigram, f"bigram, add {scores.smoothing:g} (best)": scores.bigram}
    return [(name, nats, nats * bits) for name, nats in named.items()]


def scored_tokens(
    config: RunConfig, corpus: Corpus
) -> tuple[Int[np.ndarray, "m"], Int[np.ndarray, "m"], Float[np.ndarray, "m"]]:
    """(inputs, targets, weights) of the held-out rows that training measures, place by place."""
    program = make_program(config, corpus.tokenizer, n_rows=corpus.train.n_rows)
    batches = validation_batches(
        corpus.validation,
        batch_size=config.training.batch_size,
        rows=config.evaluation.rows,
        isolate_documents=config.data.isolate_documents,
    )
    corrupt = jax.jit(functools.partial(program.corrupt, program.task))
    examples = [corrupt(batch) for batch in batches]

    def join(field: str) -> np.ndarray:
        return np.concatenate([np.asarray(getattr(example, field)).reshape(-1) for example in examples])

    return join("inputs"), join("targets"), join("weights")


def training_pairs(split: Split, *, isolate_documents: bool) -> Iterator[Pairs]:
    """Every pair of neighbours that a causal run may train on, some thousand rows at a time."""
    for begin in range(0, split.n_rows, PIECE_ROWS):
        row_ids = np.arange(begin, min(begin + PIECE_ROWS, split.n_rows))
        tokens, segments, _ = split.rows(row_ids, isolate_documents=isolate_documents)
        is_pair = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        yield tokens[:, :-1][is_pair], tokens[:, 1:][is_pair]


def table(config: RunConfig, rows: Rows) -> str:
    """The held-out table as text; what is no likelihood has no bits per byte."""
    is_causal = config.objective.name == "clm"
    title = TITLES.get(config.objective.name, "held-out loss")
    width = max(map(len, [title, *(name for name, _, _ in rows)]))
    lines = [f"{title:<{width}}  nats per token" + ("  bits per byte" if is_causal else "")]
    for name, nats, bits in rows:
        lines.append(f"{name:<{width}}  {nats:14.4f}" + ("" if bits is None else f"  {bits:13.4f}"))
    return "\n".join(lines)


def print_samples(config: RunConfig, corpus: Corpus, result: loop.Result) -> None:
    """Prints `config.generation.samples` continuations of the config's prompt, and how different several are."""
    prompt = config.generation.prompt
    prompts = [prompt] * config.generation.samples
    rack = settled_rack(config, result.frozen)
    depth = depth_of(config, rack, functools.partial(read_tap, config, result.taps))
    samples = continue_texts(rack, config, corpus.tokenizer, prompts, seed=config.seed, depth=depth)
    for number, sample in enumerate(samples.rows, start=1):
        print(f"\n--- sample {number} of {len(samples.rows)}, prompt {prompt!r}")
        print(printable(sample.text))
    if len(samples.rows) > 1:
        print(f"\n{samples.figures}")


def _held_out_rows(held_out: Mapping[str, Mapping[str, float]]) -> Rows:
    """A line a phase and, where it asks several things, one for each of them."""
    rows: Rows = []
    for phase, figures in held_out.items():
        rows.append((phase, figures["loss"], figures.get("bits_per_byte")))
        parts = {name: value for name, value in figures.items() if name not in ("loss", "bits_per_byte")}
        rows += [(f"  {name}", value, None) for name, value in parts.items()]
    return rows
