"""Budgets that make runs cost the same: as many steps as a number of FLOPs allows, cache passes included."""

import dataclasses

from stackwise_jax.errors import UserError
from stackwise_jax.schema import RunConfig
from stackwise_jax.train.plan import make_plan

TRIAL_STEPS = 1000  # of every budget in the plan that costs are read from: shares of it are whole steps, or nearly


def training_flops(config: RunConfig, rows: int | None = None) -> float:
    """FLOPs of a run by its plan; `rows` as in `share_out`."""
    return make_plan(config, rows).flops


def share_out(
    config: RunConfig, flops: float, embedding_share: float, rows: int | None = None, *, fusion_share: float = 0.0
) -> RunConfig:
    """The same run with budgets that come to `flops`, to within half a step of all phases.

    Args:
      embedding_share: part of the FLOPs that a phase of embedding and head alone gets, where there is one.
      rows: training rows; None: data.max_rows. They decide what bringing the cache from stack to stack costs.
      fusion_share: part that stacks trained together get, where a run has a budget for it.

    Raises:
      UserError: the cache passes and one step of every phase take more than `flops`, or the cache is walked in
        windows, whose refills depend on the steps.
    """
    if config.cache.window_gib is not None:
        raise UserError(f"cache.window_gib={config.cache.window_gib} must be None where runs are compared")
    plan = make_plan(_with_steps(config, TRIAL_STEPS, TRIAL_STEPS, TRIAL_STEPS), rows)
    costs = {"embedding": 0.0, "fusion": 0.0, "stacks": 0.0}  # of a budget of one step
    for phase, step_flops in zip(plan.phases, plan.step_flops, strict=True):
        costs[_kind(phase.name)] += phase.steps * step_flops / TRIAL_STEPS
    wanted = {"embedding": embedding_share * flops, "fusion": fusion_share * flops}
    steps = {kind: max(1, round(wanted[kind] / costs[kind])) for kind in wanted if costs[kind]}
    left = flops - sum(plan.pass_flops) - sum(count * costs[kind] for kind, count in steps.items())
    in_stacks = round(left / costs["stacks"])
    if in_stacks < 1:
        passes = 100 * sum(plan.pass_flops) / flops
        raise UserError(
            f"{config.name}: {flops:.3g} FLOPs leave no step for its stacks (cache passes alone take {passes:.0f}%); "
            "lower data.max_rows or give more tokens"
        )
    return _with_steps(config, steps.get("embedding", 1), in_stacks, steps.get("fusion", 0))


def _kind(name: str) -> str:
    """Which budget a phase of that name goes by."""
    return next((kind for kind in ("embedding", "fusion") if name.startswith(kind)), "stacks")


def _with_steps(config: RunConfig, embedding_steps: int, steps: int, fusion_steps: int) -> RunConfig:
    """Budgets in tokens, so that another batch size keeps the FLOPs."""
    tokens = config.training.batch_size * config.data.seq_len
    training = dataclasses.replace(
        config.training, embedding_budget=f"{embedding_steps * tokens} tokens", phase_budget=f"{steps * tokens} tokens"
    )
    if training.fusion.budget and fusion_steps:
        fusion = dataclasses.replace(training.fusion, budget=f"{fusion_steps * tokens} tokens")
        training = dataclasses.replace(training, fusion=fusion)
    return dataclasses.replace(config, training=training)
