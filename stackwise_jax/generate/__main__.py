"""Reads a trained run, from its folder alone: continues prompts, or fills holes in texts.

    python -m stackwise_jax.generate --workdir=runs/quickstart --prompt="def " --tokens=100 --temperature=0.8
    python -m stackwise_jax.generate --workdir=runs/bert --infill="def [MASK:8](x):\\n    return [MASK:20]" --steps=14

The sampler is the one that fits the run: one token after another for a causal run, unmasking for a masked one. Without
--prompt the run's own `generation.prompt` is continued; an empty prompt begins a new document. What is not given comes
from the `generation` section of the run's config.
"""

import dataclasses
import itertools
from typing import Any

from absl import flags

from stackwise_jax import config as config_lib
from stackwise_jax.checks.choices import REVEAL_ORDERS, SAMPLERS
from stackwise_jax.command import required_workdir, run_command
from stackwise_jax.errors import UserError
from stackwise_jax.schema import RunConfig

LARGEST_SEED = 2**32 - 1
# Flags that stand for fields of the config's `generation` section.
STRINGS = {
    "sampler": f"How the run is read: auto, {', '.join(SAMPLERS)}.",
    "order": f"Which masked places are revealed first: {', '.join(REVEAL_ORDERS)}.",
}
INTEGERS = {
    "tokens": "New tokens a sample: at most, or exactly where they are unmasked.",
    "top_k": "Draw among the k likeliest tokens; 0: all.",
    "steps": "Passes a sample of samplers that unmask; fewer than tokens reveal several a pass.",
    "block_length": "Unmask blocks of so many places, left to right.",
}
FLOATS = {
    "temperature": "0 always takes the likeliest token.",
    "top_p": "Draw among the likeliest tokens that hold this probability; 1: all.",
    "repetition_penalty": "Divides the scores of tokens that were said before; 1: none.",
    "remask": "Probability that a pass masks a revealed place again.",
    "threshold": "Also reveal every place this confident, whatever --steps says.",
}


def make_options() -> flags.FlagValues:
    """The flags of this program."""
    options = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "The run folder.", flag_values=options)
    flags.DEFINE_multi_string("prompt", None, "A text to continue; may be given several times.", flag_values=options)
    infill_help = "A text whose [MASK:n] are filled with n tokens; may be given several times."
    flags.DEFINE_multi_string("infill", None, infill_help, flag_values=options)
    for name, about in STRINGS.items():
        flags.DEFINE_string(name, None, about, flag_values=options)
    for name, about in INTEGERS.items():
        flags.DEFINE_integer(name, None, about, flag_values=options)
    for name, about in FLOATS.items():
        flags.DEFINE_float(name, None, about, flag_values=options)
    flags.DEFINE_integer("seed", 0, "Of the draws.", lower_bound=0, upper_bound=LARGEST_SEED, flag_values=options)
    flags.DEFINE_integer("samples", 1, "Samples a prompt.", lower_bound=1, flag_values=options)
    flags.DEFINE_integer("stacks", None, "Read only the first stacks.", lower_bound=1, flag_values=options)
    entry_help = "Stack that the embedding is handed to, from 0; those left of it are left out."
    flags.DEFINE_integer("entry", 0, entry_help, lower_bound=0, flag_values=options)
    form_help = "How the bands of a run whose time is depth are run: as trained, or step_local."
    flags.DEFINE_string("form", None, form_help, flag_values=options)
    return options


def main(options: Any) -> None:
    """Prints every prompt with its continuations, or every text with its holes filled."""
    workdir = required_workdir(options)
    if options.prompt is not None and options.infill is not None:
        raise UserError("--prompt and --infill are one or the other; give the text with its holes in --infill")
    from stackwise_jax.generate.depth import depth_of
    from stackwise_jax.generate.texts import continue_texts, fill_texts, printable
    from stackwise_jax.memory.placement import start_backend
    from stackwise_jax.train.trained import load_trained

    start_backend()
    trained = load_trained(workdir, n_stacks=options.stacks, entry=options.entry)
    config = _with_generation(trained.config, options)
    read = continue_texts if options.infill is None else fill_texts
    given = [config.generation.prompt] if options.prompt is None else options.prompt
    given = given if options.infill is None else options.infill
    repeated = list(itertools.chain.from_iterable([text] * options.samples for text in given))
    depth = depth_of(config, trained.rack, trained.tap, form=options.form)
    samples = read(trained.rack, config, trained.tokenizer, repeated, seed=options.seed, depth=depth)
    for number, sample in enumerate(samples.rows, start=1):
        if len(repeated) > 1:
            print(f"--- {number} of {len(repeated)}")
        print(printable(sample.text))
    if len(repeated) > 1:
        print(f"--- {samples.figures}")


def _with_generation(config: RunConfig, options: Any) -> RunConfig:
    """The run's config with the given flags in its `generation` section, checked as any config is."""
    names = (*STRINGS, *INTEGERS, *FLOATS)
    given = {name: options[name].value for name in names if options[name].value is not None}
    generation = dataclasses.replace(config.generation, **given)
    return config_lib.resolve(dataclasses.asdict(dataclasses.replace(config, generation=generation)))


if __name__ == "__main__":
    run_command(main, make_options(), __doc__ or "")
