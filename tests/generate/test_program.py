"""`python -m stackwise_jax.generate` on a run folder alone."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import pytest

from stackwise_jax.command import run_command
from stackwise_jax.data.corpus import Corpus
from stackwise_jax.errors import UserError
from stackwise_jax.generate import __main__ as program
from stackwise_jax.generate.depth import Depth
from stackwise_jax.generate.texts import continue_texts, fill_texts, parse_holes
from stackwise_jax.train import loop
from stackwise_jax.train.trained import load_trained


@pytest.fixture(scope="module")
def folder(tiny: Any, tiny_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    config = tiny(model__architecture__n_stacks=2, generation__tokens=5, generation__prompt="word ")
    loop.run(config, tiny_corpus, path, say=lambda _: None)
    return path


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    run_command(program.main, program.make_options(), program.__doc__ or "", ["generate", *arguments])
    return capsys.readouterr().out


def test_prompts_are_followed_by_their_continuation(folder: Path, capsys: pytest.CaptureFixture[str]):
    printed = told(capsys, f"--workdir={folder}", "--prompt=the of", "--prompt=and to, ", "--samples=2")
    *parts, figures = printed.split("--- ")[1:]
    assert re.fullmatch(r"4 samples: distinct-2 \d\.\d{3}, entropy \d\.\d{3} nats\n", figures)
    assert [part.splitlines()[0] for part in parts] == ["1 of 4", "2 of 4", "3 of 4", "4 of 4"]
    starts = ["the of", "the of", "and to, ", "and to, "]
    assert all(part.split("\n", 1)[1].startswith(start) for part, start in zip(parts, starts, strict=True))
    assert parts[0].split("\n", 1)[1] != parts[1].split("\n", 1)[1]


def test_what_is_not_given_is_the_runs_own(folder: Path, capsys: pytest.CaptureFixture[str]):
    own = told(capsys, f"--workdir={folder}")
    assert own.startswith("word ")
    assert own == told(capsys, f"--workdir={folder}", "--prompt=word ", "--tokens=5", "--temperature=0.8", "--seed=0")
    assert len(told(capsys, f"--workdir={folder}", "--tokens=40")) > len(own)
    seeds = {told(capsys, f"--workdir={folder}", f"--seed={seed}") for seed in range(4)}
    assert len(seeds) > 1


def test_an_empty_prompt_begins_a_document(folder: Path):
    trained = load_trained(folder)
    (sample,) = continue_texts(trained.rack, trained.config, trained.tokenizer, [""], seed=0).rows
    assert sample.text


def test_the_first_stacks_can_be_read_alone(folder: Path, capsys: pytest.CaptureFixture[str]):
    greedy = [f"--workdir={folder}", "--temperature=0", "--tokens=30", "--prompt=the "]
    assert told(capsys, *greedy) == told(capsys, *greedy, "--stacks=2")
    assert told(capsys, *greedy, "--stacks=1")


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]):
    printed = told(capsys, "--help")
    for name in ("workdir", "prompt", "tokens", "temperature", "top_k", "top_p", "seed", "samples", "stacks", "infill"):
        assert f"--{name}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--workdir is missing"),
        (["--workdir=RUN", "--temperature=-1"], "generation.temperature=-1.0 must be at least 0"),
        (["--workdir=RUN", "--top_p=1.5"], "generation.top_p=1.5 must lie between 0 and 1"),
        (["--workdir=RUN", "--tokens=0"], "generation.tokens=0"),
        (["--workdir=RUN", "--samples=0"], "--samples=0"),
        (
            ["--workdir=RUN", "--steps=3"],
            "generation.steps=3 is for samplers that unmask, and this run (objective.name",
        ),
        (
            ["--workdir=RUN", "--sampler=denoise"],
            "objective.name='clm', model.attention='causal'); it can be read by: a",
        ),
        (["--workdir=RUN", "--infill=a[MASK]"], "sampler 'autoregressive' of this run continues texts only"),
        (["--workdir=RUN", "--infill=a[MASK]", "--prompt=a"], "--prompt and --infill are one or the other"),
        (["--workdir=RUN", "--prompt=\udcff"], "is not Unicode text"),
        (["--workdir=RUN", "--promt=a"], "Did you mean: prompt"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        told(capsys, *(argument.replace("RUN", str(folder)) for argument in arguments))
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.fixture(scope="module")
def masked(tiny: Any, tiny_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "masked"
    config = tiny(
        model__architecture__n_stacks=1,
        objective__name="mlm",
        model__attention="bidirectional",
        training__embedding_budget="1 steps",
        training__phase_budget="1 steps",
        generation__tokens=6,
        generation__prompt="word ",
    )
    loop.run(config, tiny_corpus, path, say=lambda _: None)
    return path


def test_a_masked_run_continues_by_unmasking(masked: Path, capsys: pytest.CaptureFixture[str]):
    own = told(capsys, f"--workdir={masked}")
    assert own.startswith("word ")
    assert len(own) > len("word \n")
    printed = told(capsys, f"--workdir={masked}", "--prompt=the of", "--prompt=and", "--steps=3", "--order=entropy")
    assert printed.startswith("--- 1 of 2\nthe of")
    assert ", 3 network evaluations" in printed
    blocks = told(capsys, f"--workdir={masked}", "--sampler=blocks", "--block_length=4", "--samples=2", "--steps=4")
    assert blocks.count("\nword ") == 2


def test_holes_are_filled_between_given_texts(masked: Path, capsys: pytest.CaptureFixture[str]):
    printed = told(capsys, f"--workdir={masked}", "--infill=the [MASK:4] of[MASK]!", "--infill=[MASK:2]and", "--seed=3")
    first, second = (part.split("\n", 1)[1] for part in printed.split("--- ")[1:3])
    assert re.fullmatch(r"the .* of.*!\n", first, re.DOTALL)
    assert second.endswith("and\n")
    assert ", 5 network evaluations" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler=autoregressive"], "cannot read this run (objective.name='mlm', model.attention='bidirectional'"),
        (["--sampler=autoregressive"], "it can be read by: denoise, blocks"),
        (["--sampler=blocks"], "needs generation.block_length"),
        (["--sampler=blocks", "--block_length=4", "--infill=a[MASK]"], "or choose the sampler 'denoise'"),
        (["--infill=no hole"], "--infill='no hole' must hold [MASK:n]"),
        (["--block_length=2", "--steps=2"], "steps=2 is too few for 3 blocks"),
        (["--threshold=0.9", "--order=random"], "generation.threshold=0.9 needs generation.order='confidence'"),
    ],
)
def test_what_a_masked_run_cannot_do_is_one_line(
    arguments: list[str], message: str, masked: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        told(capsys, f"--workdir={masked}", *arguments)
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_run_whose_time_is_depth_reads_band_by_band(masked: Path):
    trained = load_trained(masked)
    depth = Depth(bands=((0.5, 1.0), (0.0, 0.5)), stacks=((0,), (0,)), form="suffix")
    read = functools.partial(continue_texts, trained.rack, tokenizer=trained.tokenizer, seed=1, depth=depth)
    samples = read(config=trained.config, prompts=["the", "a longer word "])
    assert samples.rows[1].text.startswith("a longer word ")
    assert [len(sample.new[0]) for sample in samples.rows] == [6, 6]
    fill = functools.partial(fill_texts, trained.rack, trained.config, trained.tokenizer, seed=1)
    given = ["a [MASK:3] and for which they [MASK] the word"]
    assert fill(given, depth=depth).rows[0].text == fill(given).rows[0].text  # one stack, so both ways are one
    generation = dataclasses.replace(trained.config.generation, block_length=2)
    with pytest.raises(UserError, match=r"generation.block_length=2.*band by band"):
        read(config=dataclasses.replace(trained.config, generation=generation), prompts=["the"])


def test_holes_are_taken_out_of_texts():
    assert parse_holes("[MASK:12]a[MASK] b") == ["", 12, "a", 1, " b"]
    for text in ("[mask]", "a[MASK:0]"):
        with pytest.raises(UserError, match="must hold"):
            parse_holes(text)
