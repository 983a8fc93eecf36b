"""Assembles stacks of finished runs into one rack and, where asked to, trains parts of it together.

    python -m stackwise_jax.fuse --source=runs/quickstart --workdir=runs/fused --budget="100 steps"
    python -m stackwise_jax.fuse --source=runs/a:0-3 --source=runs/b:4-7 --workdir=runs/ab --live=last:2 \\
        --budget="1M tokens"
    python -m stackwise_jax.fuse --source=runs/masked --workdir=runs/causal --live=adapters --budget="200 steps" \\
        --set=objective.name=clm --set=model.attention=causal

The config is that of the first source; --set changes it. Without --budget the rack is only assembled. The embedding is
that of the first source, the head that of the last. The new run folder continues and reads like any other.
"""

import dataclasses
from typing import Any

from absl import flags

from stackwise_jax import config as config_lib
from stackwise_jax.command import required_workdir, run_command
from stackwise_jax.errors import UserError
from stackwise_jax.overrides import apply_overrides
from stackwise_jax.schema import RunConfig


def make_options() -> flags.FlagValues:
    """The flags of this program."""
    options = flags.FlagValues()
    source_help = "A finished run, FOLDER or FOLDER:FIRST-LAST of its stacks; several follow one another."
    flags.DEFINE_multi_string("source", None, source_help, flag_values=options)
    flags.DEFINE_string("workdir", None, "The new run folder.", flag_values=options)
    budget_help = 'Of training it, such as "300 steps"; empty: assemble only.'
    flags.DEFINE_string("budget", "", budget_help, flag_values=options)
    flags.DEFINE_string("live", "all", "What is trained: all, last:N (stacks) or adapters.", flag_values=options)
    set_help = "A config field: --set=objective.name=clm."
    flags.DEFINE_multi_string("set", [], set_help, flag_values=options)
    flags.DEFINE_bool("plan", False, "Print what the run will do and cost, then stop.", flag_values=options)
    return options


def main(options: Any) -> None:
    """Assembles, trains and reports."""
    workdir = required_workdir(options)
    if not options.source:
        raise UserError("--source is missing; give the folder of a finished run, for example --source=runs/quickstart")
    config = fused_config(options.source, options.live, options.budget, options.set, name=workdir.name)
    if options.plan:
        from stackwise_jax.train.describe import describe
        from stackwise_jax.train.machine import machine
        from stackwise_jax.train.plan import make_plan

        print(describe(make_plan(config, None), machine(workdir, peak=config.logging.peak_flops)))
        return
    from stackwise_jax.memory.placement import start_backend
    from stackwise_jax.report import train_and_report

    start_backend()
    train_and_report(config, workdir)


def fused_config(sources: list[str], live: str, budget: str, overrides: list[str], *, name: str) -> RunConfig:
    """The config of a fusion run: the first source's, with the blocks of all and nothing of how they were grown.

    Raises:
      UserError: a source that is no finished run, a field that does not exist, or values that do not fit together.
    """
    from stackwise_jax.train.phases import stack_sizes
    from stackwise_jax.train.sources import chosen_stacks, open_source, parse_sources

    parsed = parse_sources("; ".join(sources))
    configs = [open_source(folder).config for folder, _, _ in parsed]
    first, n_blocks = configs[0], 0
    for (folder, begin, end), config in zip(parsed, configs, strict=True):
        sizes = stack_sizes(config)
        n_blocks += sum(sizes[stack] for stack in chosen_stacks(folder, len(sizes), begin, end))
    size = stack_sizes(first)[0] if n_blocks % stack_sizes(first)[0] == 0 else 1
    entries = config_lib.default()
    entries.update(dataclasses.asdict(config_lib.without_growth(first)))
    entries.name = name
    entries.model.architecture.update({"n_stacks": n_blocks // size, "blocks_per_stack": size})
    if not first.data.prepared:
        entries.data.tokenizer = str((parsed[0][0] / "tokenizer.model").absolute())
    entries.training.update({"mode": "fusion", "embedding_from": "", "embedding_phase": "alone"})
    entries.training.fusion.update({"sources": "; ".join(sources), "budget": budget, "live": live})
    apply_overrides(entries, overrides)
    return config_lib.resolve(entries)


if __name__ == "__main__":
    run_command(main, make_options(), __doc__ or "")
