"""Continues prompts with a trained causal run, from its folder alone.

    python -m stackwise_jax.generate --workdir=runs/quickstart --prompt="def " --tokens=100 --temperature=0.8

Without --prompt the run's own `generation.prompt` is continued; an empty prompt begins a new document. What is not
given comes from the `generation` section of the run's config.
"""

import dataclasses
import itertools
from typing import Any

from absl import flags

from stackwise_jax import config as config_lib
from stackwise_jax.command import required_workdir, run_command
from stackwise_jax.schema import RunConfig

LARGEST_SEED = 2**32 - 1


def make_options() -> flags.FlagValues:
    """The flags of this program."""
    options = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "The run folder.", flag_values=options)
    flags.DEFINE_multi_string("prompt", None, "A text to continue; may be given several times.", flag_values=options)
    flags.DEFINE_integer("tokens", None, "New tokens a sample, at most.", flag_values=options)
    flags.DEFINE_float("temperature", None, "0 always takes the likeliest token.", flag_values=options)
    flags.DEFINE_integer("top_k", None, "Draw among the k likeliest tokens; 0: all.", flag_values=options)
    flags.DEFINE_float(
        "top_p", None, "Draw among the likeliest tokens that hold this probability; 1: all.", flag_values=options
    )
    flags.DEFINE_integer("seed", 0, "Of the draws.", lower_bound=0, upper_bound=LARGEST_SEED, flag_values=options)
    flags.DEFINE_integer("samples", 1, "Continuations a prompt.", lower_bound=1, flag_values=options)
    flags.DEFINE_integer("stacks", None, "Read only the first stacks.", lower_bound=1, flag_values=options)
    return options


def main(options: Any) -> None:
    """Prints every prompt with its continuations."""
    workdir = required_workdir(options)
    from stackwise_jax.generate.autoregressive import continue_texts, printable
    from stackwise_jax.memory.placement import start_backend
    from stackwise_jax.train.trained import load_trained

    start_backend()
    trained = load_trained(workdir, n_stacks=options.stacks)
    config = _with_generation(trained.config, options)
    prompts = [config.generation.prompt] if options.prompt is None else options.prompt
    repeated = list(itertools.chain.from_iterable([prompt] * options.samples for prompt in prompts))
    texts = continue_texts(trained.rack, config, trained.tokenizer, repeated, seed=options.seed)
    for number, (prompt, text) in enumerate(zip(repeated, texts, strict=True), start=1):
        if len(repeated) > 1:
            print(f"--- {number} of {len(repeated)}")
        print(printable(prompt + text))


def _with_generation(config: RunConfig, options: Any) -> RunConfig:
    """The run's config with the given flags in its `generation` section, checked as any config is."""
    names = ("tokens", "temperature", "top_k", "top_p")
    given = {name: options[name].value for name in names if options[name].value is not None}
    generation = dataclasses.replace(config.generation, **given)
    return config_lib.resolve(dataclasses.asdict(dataclasses.replace(config, generation=generation)))


if __name__ == "__main__":
    run_command(main, make_options(), __doc__ or "")
