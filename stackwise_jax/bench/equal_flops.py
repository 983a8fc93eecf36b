"""Budgets that make runs cost the same: as many steps as a number of FLOPs allows, cache passes included."""

import dataclasses

from stackwise_jax.errors import UserError
from stackwise_jax.schema import RunConfig
from stackwise_jax.train.plan import make_plan


def training_flops(config: RunConfig, rows: int | None = None) -> float:
    """FLOPs of a run by its plan; `rows` as in `share_out`."""
    return make_plan(config, rows).flops


def share_out(config: RunConfig, flops: float, embedding_share: float, rows: int | None = None) -> RunConfig:
    """The same run with budgets that come to `flops`, to within half a step of all phases.

    Args:
      embedding_share: part of the FLOPs that a phase of embedding and head alone gets, where there is one.
      rows: training rows; None: data.max_rows. They decide what bringing the cache from stack to stack costs.

    Raises:
      UserError: the cache passes and one step of every phase take more than `flops`, or the cache is walked in
        windows, whose refills depend on the steps.
    """
    if config.cache.window_gib is not None:
        raise UserError(f"cache.window_gib={config.cache.window_gib} must be None where runs are compared")
    one = _with_steps(config, 1, 1)
    plan = make_plan(one, rows)
    first = 1 if not plan.phases[0].main.path else 0  # a phase of embedding and head alone
    embedding_flops, stack_flops = sum(plan.step_flops[:first]), sum(plan.step_flops[first:])
    embedding_steps = max(1, round(embedding_share * flops / embedding_flops)) if first else 1
    left = flops - sum(plan.pass_flops) - embedding_steps * embedding_flops
    steps = round(left / stack_flops)
    if steps < 1:
        passes = 100 * sum(plan.pass_flops) / flops
        raise UserError(
            f"{config.name}: {flops:.3g} FLOPs leave no step for its stacks (cache passes alone take {passes:.0f}%); "
            "lower data.max_rows or give more tokens"
        )
    return _with_steps(config, embedding_steps, steps)


def _with_steps(config: RunConfig, embedding_steps: int, steps: int) -> RunConfig:
    """Budgets in tokens, so that another batch size keeps the FLOPs."""
    tokens = config.training.batch_size * config.data.seq_len
    budgets = {"embedding_budget": f"{embedding_steps * tokens} tokens", "phase_budget": f"{steps * tokens} tokens"}
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **budgets))
