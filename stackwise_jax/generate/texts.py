"""Texts in, texts out: a run read by the sampler that its config chooses."""

import dataclasses
import itertools
import re
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool, Int

from stackwise_jax.checks.generation import block_length, reading_attention, samplers
from stackwise_jax.data.tokenizer import Tokenizer
from stackwise_jax.errors import UserError
from stackwise_jax.evals.diversity import distinct, token_entropy
from stackwise_jax.generate.autoregressive import generate
from stackwise_jax.generate.blocks import generate_blocks
from stackwise_jax.generate.denoise import RackDenoiser, check_length, denoise, pad_rows
from stackwise_jax.generate.depth import Depth, denoise_by_depth, make_band_denoisers
from stackwise_jax.generate.reveal import Rule, row_keys
from stackwise_jax.memory.precision import DTYPES
from stackwise_jax.schema import RunConfig
from stackwise_jax.types import Keys, Params

# C0 but for tab and newline, delete, and C1: what could move a terminal's cursor or colour it.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_HOLE = re.compile(r"\[MASK(?::(\d+))?\]")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One text.

    Attributes:
      text: what was given and what is new, in order.
      new: the new ids, a run for each stretch of them.
    """

    text: str
    new: tuple[Int[np.ndarray, "_"], ...]


@dataclasses.dataclass(frozen=True)
class Samples:
    """What a call drew.

    Attributes:
      rows: one sample a prompt.
      passes: network evaluations that unmasked; None for an autoregressive run.
    """

    rows: tuple[Sample, ...]
    passes: int | None

    @property
    def figures(self) -> str:
        """One line about several samples: how different they are, and what they cost."""
        new = [sample.new for sample in self.rows]
        cost = "" if self.passes is None else f", {self.passes} network evaluations"
        return f"{len(new)} samples: distinct-2 {distinct(new):.3f}, entropy {token_entropy(new):.3f} nats{cost}"


def continue_texts(
    rack: Params,
    config: RunConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    seed: int,
    depth: Depth | None = None,
) -> Samples:
    """Continues texts, each read as the beginning of a document, as `config.generation` says.

    Args:
      depth: of a run whose time is depth: the stacks of each band of noise unmask in turn. None: the whole rack reads.

    Raises:
      UserError: a prompt is no Unicode text, a text would be longer than the model's learned positions, or there are
        fewer steps than blocks.
    """
    generation = config.generation
    ids = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    sampler = _sampler(config)
    config = _as_read(config, sampler)
    if depth is not None or sampler == "denoise":
        parts = [[prompt, generation.tokens] for prompt in prompts]
        return _fill(rack, config, tokenizer, parts, seed=seed, depth=depth)
    allowed = allowed_ids(tokenizer, config.model.vocab_size, ends=sampler == "autoregressive")
    passes = None
    if sampler == "autoregressive":
        continued = generate(
            rack,
            config.model,
            ids,
            tokens=generation.tokens,
            key=jax.random.key(seed),
            allowed=allowed,
            temperature=generation.temperature,
            top_k=generation.top_k,
            top_p=generation.top_p,
            repetition_penalty=generation.repetition_penalty,
            eos_id=tokenizer.eos_id,
            dtype=DTYPES[config.precision.compute],
        )
    else:
        length = block_length(config)
        if length is None:
            raise ValueError("blocks have no length; resolve() sees to it")
        continued, passes = generate_blocks(
            rack,
            config.model,
            ids,
            tokens=generation.tokens,
            block_length=length,
            keys=row_keys(jax.random.key(seed), len(ids)),
            allowed=allowed,
            rule=_rule(config, tokenizer),
            pad_id=tokenizer.pad_id,
            dtype=DTYPES[config.precision.compute],
            shift=config.objective.shift,
            steps=generation.steps,
        )
    new = [row[len(given) :] for row, given in zip(continued, ids, strict=True)]
    rows = [Sample(prompt + tokenizer.decode(run), (run,)) for prompt, run in zip(prompts, new, strict=True)]
    return Samples(tuple(rows), passes)


def fill_texts(
    rack: Params,
    config: RunConfig,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    seed: int,
    depth: Depth | None = None,
) -> Samples:
    """Fills the holes of texts: each [MASK:n] with n tokens, [MASK] with one. `depth`: as in `continue_texts`.

    Raises:
      UserError: the run does not fill in, a text has no hole, or see `continue_texts`.
    """
    sampler = _sampler(config)
    if depth is None and sampler != "denoise":
        others = "" if "denoise" not in samplers(config) else ", or choose the sampler 'denoise', which fills holes"
        raise UserError(f"--infill: the sampler {sampler!r} of this run continues texts only; give --prompt{others}")
    parts = [parse_holes(text) for text in texts]
    return _fill(rack, _as_read(config, "denoise"), tokenizer, parts, seed=seed, depth=depth)


def parse_holes(text: str) -> list[str | int]:
    """Takes a text with holes apart into texts and numbers of masks.

    >>> parse_holes("def [MASK:3](x):[MASK]")
    ['def ', 3, '(x):', 1, '']

    Raises:
      UserError: no hole, or an empty one.
    """
    pieces = _HOLE.split(text)
    holes = [1 if n is None else int(n) for n in pieces[1::2]]
    if not holes or 0 in holes:
        raise UserError(f"--infill={text!r} must hold [MASK:n], n at least 1, wherever n tokens are to be filled in")
    return [part for pair in itertools.zip_longest(pieces[::2], holes) for part in pair if part is not None]


def allowed_ids(tokenizer: Tokenizer, vocab_size: int, *, ends: bool) -> Bool[np.ndarray, "V"]:
    """Ids that may be drawn: those of text and, where it `ends`, the end of the document."""
    allowed = np.arange(vocab_size) < tokenizer.vocab_size
    allowed[list(tokenizer.special_ids)] = False
    allowed[tokenizer.eos_id] = ends
    return allowed


def printable(text: str) -> str:
    """A text without the control characters that a terminal would obey; tabs and newlines stay."""
    return _CONTROL.sub("", text)


def _fill(
    rack: Params,
    config: RunConfig,
    tokenizer: Tokenizer,
    texts: Sequence[Sequence[str | int]],
    *,
    seed: int,
    depth: Depth | None,
) -> Samples:
    """Fills rows of given texts and numbers of masks, each the beginning of a document."""
    if not texts:
        return Samples((), 0)
    runs = [[_part_ids(tokenizer, part) for part in parts] for parts in texts]
    rows = [np.concatenate([[tokenizer.bos_id], *own]).astype(np.int32) for own in runs]
    check_length(config.model, max(map(len, rows)))
    canvas = pad_rows(rows, tokenizer.pad_id)
    filled, passes = _fill_canvas(rack, config, tokenizer, canvas, row_keys(jax.random.key(seed), len(rows)), depth)
    samples = []
    for row, parts, own in zip(filled, texts, runs, strict=True):
        ends = 1 + np.cumsum([len(run) for run in own])
        new = [row[end - len(run) : end] for end, run in zip(ends, own, strict=True)]
        words = [part if isinstance(part, str) else tokenizer.decode(run) for part, run in zip(parts, new, strict=True)]
        holes = tuple(run for part, run in zip(parts, new, strict=True) if not isinstance(part, str))
        samples.append(Sample("".join(words), holes))
    return Samples(tuple(samples), passes)


def _fill_canvas(
    rack: Params,
    config: RunConfig,
    tokenizer: Tokenizer,
    canvas: Int[np.ndarray, "B T"],
    keys: Keys,
    depth: Depth | None,
) -> tuple[Int[np.ndarray, "B T"], int]:
    generation, model, dtype = config.generation, config.model, DTYPES[config.precision.compute]
    rule, allowed = _rule(config, tokenizer), allowed_ids(tokenizer, model.vocab_size, ends=False)
    mask_id, pad_id = tokenizer.mask_id, tokenizer.pad_id
    if depth is None:
        denoiser = RackDenoiser(rack, model, mask_id, pad_id, dtype, shift=config.objective.shift)
        length = generation.block_length
        return denoise(
            denoiser, canvas, keys=keys, allowed=allowed, rule=rule, steps=generation.steps, block_length=length
        )
    if generation.block_length is not None:
        raise UserError(
            f"generation.block_length={generation.block_length}: a run whose time is depth unmasks all places "
            "together, band by band; leave it at None"
        )
    denoisers = make_band_denoisers(
        rack,
        model,
        depth.stacks,
        form=depth.form,
        mask_id=mask_id,
        pad_id=pad_id,
        dtype=dtype,
        shift=config.objective.shift,
        heads=depth.heads,
    )
    return denoise_by_depth(
        denoisers, depth.bands, canvas, keys=keys, allowed=allowed, rule=rule, steps=generation.steps
    )


def _sampler(config: RunConfig) -> str:
    return samplers(config)[0] if config.generation.sampler == "auto" else config.generation.sampler


def _as_read(config: RunConfig, sampler: str) -> RunConfig:
    """The config with the attention under which a sampler reads the run."""
    attention = reading_attention(config, sampler)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention=attention))


def _rule(config: RunConfig, tokenizer: Tokenizer) -> Rule:
    generation = config.generation
    return Rule(
        mask_id=tokenizer.mask_id,
        order=generation.order,
        temperature=generation.temperature,
        top_k=generation.top_k,
        top_p=generation.top_p,
        repetition_penalty=generation.repetition_penalty,
        remask=generation.remask,
        threshold=generation.threshold,
    )


def _part_ids(tokenizer: Tokenizer, part: str | int) -> Int[np.ndarray, "_"]:
    if isinstance(part, str):
        return _text_ids(tokenizer, part)
    return np.full(part, tokenizer.mask_id, np.int32)


def _prompt_ids(tokenizer: Tokenizer, prompt: str) -> Int[np.ndarray, "_"]:
    return np.concatenate([[tokenizer.bos_id], _text_ids(tokenizer, prompt)]).astype(np.int32)


def _text_ids(tokenizer: Tokenizer, text: str) -> Int[np.ndarray, "_"]:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a command line that are not UTF-8
        raise UserError(f"prompt {text!r} is not Unicode text; give it in UTF-8") from None
    return tokenizer.encode(text)
