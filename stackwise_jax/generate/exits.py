"""The stacks and heads of a run as the stages and judges of `evals/exits.py`."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from stackwise_jax.errors import UserError
from stackwise_jax.evals.exits import ExitFigures, Left, Scores, StageCosts, exit_figures, leave_early
from stackwise_jax.memory import budget
from stackwise_jax.models.mixing import Context
from stackwise_jax.models.rack import apply_head_norm, output_table
from stackwise_jax.models.stack import apply_stack, stack_size
from stackwise_jax.ops.loss import token_scores
from stackwise_jax.train.curriculum import is_depth
from stackwise_jax.train.program import make_program
from stackwise_jax.train.trained import Trained
from stackwise_jax.types import Batch, Example, Params

OBJECTIVES = ("clm", "prefix", "mlm")
ExitPass = Callable[[Batch, float], tuple[Left, Bool[np.ndarray, "B T"]]]
"""(batch, threshold) -> where its places left, and which of them are asked for."""


def exit_heads(trained: Trained) -> list[Params]:
    """The head of every depth: tapped after the stack, or the one that settled before it; the last is the rack's.

    Args:
      trained: read with `merged=False`.

    Raises:
      UserError: a run that is not read from the left, or that has no head for some depth.
    """
    config, n_stacks = trained.config, len(trained.rack["stacks"])
    if n_stacks != trained.n_stacks:
        raise ValueError("stacks have been merged; read the run with load_trained(folder, merged=False)")
    if config.training.progressive.direction != "left_to_right" or is_depth(config):
        raise UserError(
            "--exit is for runs that grew left to right and whose time is not depth, and this one has "
            f"training.progressive.direction={config.training.progressive.direction!r} and objective.time="
            f"{config.objective.time!r}; leave it out"
        )
    if config.objective.name not in OBJECTIVES:
        raise UserError(
            f"--exit is for objective.name={' or '.join(OBJECTIVES)}, not {config.objective.name!r}; leave it out"
        )
    rack_head = trained.rack["head"]
    settled = rack_head if config.training.head == "frozen" else None
    heads = [trained.tap(stack) or settled for stack in range(n_stacks - 1)]
    lacking = [str(depth) for depth, head in enumerate(heads, start=1) if head is None]
    if lacking:
        raise UserError(
            f"--exit judges by the head of every depth, and this run has none for depth {', '.join(lacking)}; it takes "
            "a run that grew a stack a phase"
        )
    return [*(head for head in heads if head is not None), rack_head]


def stage_costs(trained: Trained) -> StageCosts:
    """FLOPs a token of each stack of a run."""
    model, sizes = trained.model, [stack_size(stack) for stack in trained.rack["stacks"]]
    block = budget.block_forward_flops(model, trained.config.data.seq_len)
    stored = budget.stored_forward_flops(model)
    return StageCosts(
        tuple(size * block for size in sizes), tuple(size * stored for size in sizes), budget.head_forward_flops(model)
    )


def make_exit_pass(trained: Trained) -> ExitPass:
    """Early exit through a run's stacks on packed rows; a program for each distinct stack, whatever the depth.

    Raises:
      UserError: see `exit_heads`.
    """
    config, heads, rack = trained.config, exit_heads(trained), trained.rack
    program = make_program(config, trained.tokenizer, n_rows=1)  # as `evaluate` sees rows
    model, task, dtype = config.model, program.task, program.dtype

    @jax.jit
    def enter(embedding: Params, batch: Batch) -> tuple[Float[Array, "B T D"], Example, Context]:
        example = program.corrupt(task, batch)
        x = program.apply_embedding(embedding, example.inputs, example.positions, None)
        return x, example, program.context(task, example, embedding)

    @jax.jit
    def run(stack: Params, context: Context, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return apply_stack(stack, x, context, model, dtype=dtype)

    @jax.jit
    def judge(
        head: Params, embedding: Params, targets: Int[Array, "B T"], context: Context, x: Float[Array, "B T D"]
    ) -> Scores:
        hidden = apply_head_norm(head, x, model, context.time)
        found = token_scores(
            hidden.reshape(-1, hidden.shape[-1]),
            output_table(head, embedding).astype(dtype),
            targets.reshape(-1),
            chunk_tokens=config.training.loss_chunk_tokens,
        )
        return Scores(*(part.reshape(targets.shape) for part in found))

    def exit_pass(batch: Batch, threshold: float) -> tuple[Left, np.ndarray]:
        x, example, context = enter(rack["embedding"], batch)
        stages = [functools.partial(run, stack, context) for stack in rack["stacks"]]
        judges = [functools.partial(judge, head, rack["embedding"], example.targets, context) for head in heads]
        return leave_early(stages, judges, x, threshold), np.asarray(jnp.asarray(example.weights) > 0)

    return exit_pass


def parse_thresholds(text: str) -> list[float]:
    """Takes "0.5,0.9" apart.

    Raises:
      UserError: what is no probability above 0.
    """
    try:
        found = [float(entry) for entry in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0.0 < threshold <= 1.0 for threshold in found):
        raise UserError(f'--exit={text!r} must be probabilities above 0, at most 1, such as "0.5,0.9"')
    return found


def measure_exits(trained: Trained, batches: Iterable[Batch], thresholds: Sequence[float]) -> list[ExitFigures]:
    """Full depth first (threshold infinity), then early exit at each threshold, on the same rows.

    Args:
      trained: read with `merged=False`.

    Raises:
      UserError: see `exit_heads`; nothing in the rows is scored.
    """
    exit_pass, costs = make_exit_pass(trained), stage_costs(trained)
    training = trained.config.training
    together = training.batch_size // training.accumulation_steps  # rows that a step has on the device
    pieces = [
        jax.tree.map(lambda leaf, first=first: leaf[first : first + together], batch)
        for batch in batches
        for first in range(0, len(batch.tokens), together)
    ]
    figures = [
        exit_figures((exit_pass(piece, threshold) for piece in pieces), threshold, costs)
        for threshold in (math.inf, *thresholds)
    ]
    if math.isnan(figures[0].loss):
        raise UserError("--source has no token that the run's objective asks for; give more text")
    # At full depth nobody is asked before the end.
    return [dataclasses.replace(figures[0], share_saved=0.0), *figures[1:]]


def describe_exits(figures: Sequence[ExitFigures]) -> str:
    """A line a threshold."""
    lines = ["exit at      loss  accuracy  stacks  block FLOPs saved  FLOPs saved, with heads"]
    for own in figures:
        name = "never" if math.isinf(own.threshold) else f"{own.threshold:g}"
        lines.append(
            f"{name:<9}{own.loss:8.4f}{100 * own.accuracy:9.2f}%{own.stages:8.2f}{100 * own.block_share_saved:18.1f}%"
            f"{100 * own.share_saved:24.1f}%"
        )
    return "\n".join(lines)
