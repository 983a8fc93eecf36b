"""What must fit together in the curriculum."""

import re

from stackwise_jax.checks.attention import linear_maps
from stackwise_jax.checks.choices import GROWING_MODES, QUANTISED, RANK_PATTERNS, one_of, require
from stackwise_jax.checks.model import stack_count
from stackwise_jax.checks.text import budget_steps
from stackwise_jax.schema import AdapterConfig, RunConfig


def check_training(config: RunConfig) -> None:
    """Budgets, batches, head and schedule."""
    model, training, optimizer = config.model, config.training, config.optimizer
    for field in ("phase_budget", "embedding_budget"):
        budget_steps(getattr(training, field), 1, field=f"training.{field}")
    require(
        training.mode != "blockwise" or model.n_blocks % training.block_group == 0,
        f"training.block_group={training.block_group} must divide the {model.n_blocks} blocks of the rack",
    )
    require(
        training.batch_size % training.accumulation_steps == 0,
        f"training.batch_size={training.batch_size} must be a multiple of "
        f"training.accumulation_steps={training.accumulation_steps}",
    )
    share = training.loss_fraction
    stride = round(1.0 / share) if 0.0 < share <= 1.0 else 0
    require(
        stride > 0 and abs(stride * share - 1.0) < 1e-6 and config.data.seq_len % stride == 0,
        f"training.loss_fraction={share} must be 1 / n, n a whole number that divides data.seq_len="
        f"{config.data.seq_len}, for example 1.0, 0.5 or 0.25",
    )
    require(
        training.head != "copy" or (model.ties_embedding and training.mode in GROWING_MODES),
        "training.head='copy' unties a tied table when the embedding freezes: it needs model.ties_embedding=True "
        f"and a mode that grows, not ties_embedding={model.ties_embedding} with mode={training.mode!r}",
    )
    require(
        optimizer.schedule != "wsd" or optimizer.warmup_fraction + optimizer.decay_fraction <= 1.0,
        f"optimizer.warmup_fraction={optimizer.warmup_fraction} and decay_fraction={optimizer.decay_fraction} "
        "must not exceed 1 together",
    )


def check_embedding(config: RunConfig) -> None:
    """A token table that another run gives, and whether it, or all of the embedding, may stay as it is."""
    model, training = config.model, config.training
    require(
        not training.embedding_from or training.mode != "fusion",
        f"training.embedding_from={training.embedding_from!r}: a run of training.mode='fusion' has the embedding of "
        "its first source; leave it empty",
    )
    others = {
        f"model.d_embedding={model.d_embedding}": model.d_embedding is not None,
        "model.positions='learned'": model.positions == "learned",
        f"model.token_types={model.token_types}": model.token_types > 0,
        "model.embedding_norm=True": model.embedding_norm,
        f"objective.time={config.objective.time!r}": model.time_input,
    }
    untrained = next((name for name, is_there in others.items() if is_there), None)
    require(
        not model.fixed_table or untrained is not None,
        "model.fixed_table=True leaves nothing of this embedding to be trained; set model.d_embedding for a map after "
        "the table, or fixed_table=False with training.embedding_phase='given'",
    )
    if training.embedding_phase != "given":
        return
    require(
        bool(training.embedding_from),
        "training.embedding_phase='given' trains no embedding, so one must be there: name a finished run as "
        "training.embedding_from, or set 'alone'",
    )
    require(
        untrained is None,
        f"training.embedding_phase='given' trains nothing of the embedding, and with {untrained} it has more than a "
        "token table; set it to 'alone' or 'with_first_stack', and for a table that stays model.fixed_table=True",
    )
    require(
        training.head != "copy",
        "training.head='copy' copies a table when the embedding settles, and with training.embedding_phase='given' it "
        "never does; set model.ties_embedding=False with head='live', or embedding_phase='alone'",
    )


def check_progressive(config: RunConfig) -> None:
    """How a rack grows: direction, what happens to the trunk, last stacks, anchors, operators."""
    training, progressive, growth = config.training, config.training.progressive, config.training.growth
    grows = training.mode in GROWING_MODES
    prepends, strategy = progressive.direction == "right_to_left", progressive.trunk_strategy
    require(
        grows or progressive.direction == "left_to_right",
        f"training.progressive.direction={progressive.direction!r} needs a mode that grows a stack per phase; "
        f"training.mode={training.mode!r} trains all at once: choose one of {', '.join(GROWING_MODES)}",
    )
    require(
        strategy == "frozen" or training.mode == "progressive",
        f"training.progressive.trunk_strategy={strategy!r} needs training.mode='progressive', not {training.mode!r}",
    )
    plain = grows and strategy == "frozen" and progressive.direction == "left_to_right"
    plain = plain and config.objective.time in ("none", "input")
    for field, unset in (("last_stacks", 0), ("anchor_every", None)):
        value = getattr(progressive, field)
        require(
            value == unset or plain,
            f"training.progressive.{field}={value} is of racks that grow left to right over a frozen trunk, without "
            "objective.time='depth'",
        )
    n_stacks = stack_count(config)
    require(
        progressive.last_stacks < n_stacks,
        f"training.progressive.last_stacks={progressive.last_stacks} must be below the {n_stacks} stacks of the rack",
    )
    require(
        progressive.rebuild_every is None or progressive.anchor_every is not None,
        f"training.progressive.rebuild_every={progressive.rebuild_every} goes with training.progressive.anchor_every: "
        "without anchors no cache grows old",
    )
    for field, unset in (("operator", "random"), ("sizes", ""), ("shares", "")):
        value = getattr(growth, field)
        require(
            strategy == "full" or value == unset,
            f"training.growth.{field}={value!r} needs training.mode='progressive' with "
            f"training.progressive.trunk_strategy='full', not {training.mode!r} with {strategy!r}",
        )
    require(
        not progressive.shares or (grows and strategy != "full" and progressive.direction != "independent"),
        f"training.progressive.shares={progressive.shares!r} is of modes that train a stack or a band per phase",
    )
    decay = progressive.learning_rate_decay
    require(
        decay == 1.0 or (grows and strategy != "full" and progressive.direction != "independent"),
        f"training.progressive.learning_rate_decay={decay} is of modes that train a stack or a band per phase",
    )
    require(
        not prepends or growth.operator == "random",
        f"training.growth.operator={growth.operator!r} makes stacks after those that are there; "
        "training.progressive.direction='right_to_left' needs 'random'",
    )
    require(
        progressive.new_stack == "drawn" or (grows and strategy != "full" and config.model.norm_position == "pre"),
        f"training.progressive.new_stack={progressive.new_stack!r} is of modes that train a stack beside settled ones, "
        "in a pre-norm rack; leave it at 'drawn'",
    )
    require(
        growth.operator != "zero_output" or config.model.norm_position == "pre",
        "training.growth.operator='zero_output' changes nothing only in a pre-norm rack; set model.norm_position='pre' "
        "or another operator",
    )
    require(
        training.execution != "chained" or not config.model.time_input or training.embedding_phase == "alone",
        "training.execution='chained' does not train what turns time into a vector together with stacks; set it to "
        "'auto', or training.embedding_phase='alone'",
    )


def check_fusion(config: RunConfig) -> None:
    """The phases after growth, or a run that begins with trained stacks."""
    training, fusion, n_stacks = config.training, config.training.fusion, stack_count(config)
    begins = training.mode == "fusion"
    require(
        begins == bool(fusion.sources),
        f"training.fusion.sources={fusion.sources!r} and training.mode={training.mode!r}: the mode 'fusion' needs run "
        "folders to begin with, and no other mode takes them",
    )
    require(
        not fusion.opening or bool(fusion.budget),
        f"training.fusion.opening={fusion.opening} is a share of training.fusion.budget, which is empty; give one",
    )
    if not fusion.budget:
        return
    budget_steps(fusion.budget, 1, field="training.fusion.budget")
    _check_opening(config)
    match = re.fullmatch(r"last:([1-9]\d*)", fusion.live)
    n_live = int(match.group(1)) if match else n_stacks
    require(
        (fusion.live in ("all", "adapters") or match is not None) and n_live <= n_stacks,
        f"training.fusion.live={fusion.live!r} must be all, adapters, or last:N with N up to {n_stacks} stacks",
    )
    require(
        fusion.unfreeze_phases <= n_live,
        f"training.fusion.unfreeze_phases={fusion.unfreeze_phases} must be at most the {n_live} live stacks",
    )
    keeps = training.progressive.trunk_strategy == "qlora" and not training.adapters.merge
    require(
        not keeps or (fusion.live == "adapters" and fusion.unfreeze_phases == 1),
        f"training.fusion.live={fusion.live!r} in {fusion.unfreeze_phases} phase(s) after trunk_strategy='qlora' would "
        "train stacks without the adapters that they have; set training.adapters.merge=True, or live='adapters' in one "
        "phase",
    )
    require(
        training.mode != "end_to_end" and config.objective.time in ("none", "input"),
        "training.fusion.budget asks for a phase after growth in which stacks are trained together; it goes with a "
        "mode that grows, or 'fusion', and not with objective.time='depth'",
    )


def _check_opening(config: RunConfig) -> None:
    """Attention that opens from causal to bidirectional, in phases that end in it."""
    fusion, objective, attention = config.training.fusion, config.objective, config.model.attention
    if not fusion.opening:
        return
    require(
        objective.name in ("mlm", "diffusion") and attention == "bidirectional",
        f"training.fusion.opening={fusion.opening} ends in bidirectional attention on masked places: it needs "
        f"objective.name=mlm or diffusion and model.attention='bidirectional', not {objective.name!r} with "
        f"{attention!r}",
    )
    require(
        fusion.unfreeze_phases == 1,
        f"training.fusion.opening={fusion.opening} needs training.fusion.unfreeze_phases=1, not "
        f"{fusion.unfreeze_phases}: one thing changes from phase to phase",
    )
    steps = budget_steps(
        fusion.budget, config.training.batch_size * config.data.seq_len, field="training.fusion.budget"
    )
    opening = round(steps * fusion.opening)
    require(
        fusion.opening_stages <= opening < steps,
        f"training.fusion.opening={fusion.opening} makes {opening} of {steps} updates; it must leave some after it, "
        f"and have one at least for each of training.fusion.opening_stages={fusion.opening_stages}",
    )


def check_adapters(config: RunConfig) -> None:
    """Maps and ranks of adapters, and whether they can be merged."""
    adapters = config.training.adapters
    for name in adapters.targets.split(","):
        require(
            config.model.is_gated or name.strip() != "gate",
            f"training.adapters.targets={adapters.targets!r}: model.ffn={config.model.ffn!r} has no gate; leave it out",
        )
        one_of("training.adapters.targets", name.strip(), ("all", *linear_maps(config.model)))
    if adapters.ranks not in RANK_PATTERNS:
        adapter_ranks(adapters, stack_count(config))
    require(
        not adapters.merge or config.precision.trunk not in QUANTISED,
        f"training.adapters.merge=True adds adapters into weights, which precision.trunk={config.precision.trunk!r} "
        "stores rounded; leave it False, or store the trunk as fp32, bf16 or fp16",
    )


def adapter_ranks(config: AdapterConfig, n_stacks: int) -> tuple[int, ...]:
    """The rank of the adapter of every stack, from the left.

    >>> adapter_ranks(AdapterConfig(rank=8, ranks="increasing"), 4)
    (2, 4, 6, 8)

    Raises:
      UserError: a list that is none, or not of one rank a stack.
    """
    if config.ranks == "constant":
        return (config.rank,) * n_stacks
    if config.ranks in RANK_PATTERNS:
        rising = [max(1, (2 * config.rank * (i + 1) + n_stacks) // (2 * n_stacks)) for i in range(n_stacks)]
        return tuple(rising if config.ranks == "increasing" else rising[::-1])
    entries = [entry.strip() for entry in config.ranks.split(",")]
    patterns = ", ".join(RANK_PATTERNS)
    require(
        all(re.fullmatch(r"[1-9][0-9]{0,5}", entry) for entry in entries),
        f'training.adapters.ranks={config.ranks!r} must be one of {patterns}, or a list like "4,8,8,16"',
    )
    require(
        len(entries) == n_stacks,
        f"training.adapters.ranks={config.ranks!r} lists {len(entries)} rank(s) for {n_stacks} stacks; give each one",
    )
    return tuple(map(int, entries))
