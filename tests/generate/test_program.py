"""`python -m stackwise_jax.generate` on a run folder alone."""

from pathlib import Path
from typing import Any

import pytest

from stackwise_jax.command import run_command
from stackwise_jax.data.corpus import Corpus
from stackwise_jax.generate import __main__ as program
from stackwise_jax.generate.autoregressive import continue_texts
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
    parts = printed.split("--- ")[1:]
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
    (text,) = continue_texts(trained.rack, trained.config, trained.tokenizer, [""], seed=0)
    assert text


def test_the_first_stacks_can_be_read_alone(folder: Path, capsys: pytest.CaptureFixture[str]):
    greedy = [f"--workdir={folder}", "--temperature=0", "--tokens=30", "--prompt=the "]
    assert told(capsys, *greedy) == told(capsys, *greedy, "--stacks=2")
    assert told(capsys, *greedy, "--stacks=1")


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]):
    printed = told(capsys, "--help")
    for name in ("workdir", "prompt", "tokens", "temperature", "top_k", "top_p", "seed", "samples", "stacks"):
        assert f"--{name}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--workdir is missing"),
        (["--workdir=RUN", "--temperature=-1"], "generation.temperature=-1.0 must be at least 0"),
        (["--workdir=RUN", "--top_p=1.5"], "generation.top_p=1.5 must lie between 0 and 1"),
        (["--workdir=RUN", "--tokens=0"], "generation.tokens=0"),
        (["--workdir=RUN", "--samples=0"], "--samples=0"),
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


def test_a_masked_run_says_what_it_can_do(
    tiny: Any, tiny_corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = tiny(model__architecture__n_stacks=1, objective__name="mlm", model__attention="bidirectional")
    loop.run(config, tiny_corpus, tmp_path / "run", say=lambda _: None)
    with pytest.raises(SystemExit):
        told(capsys, f"--workdir={tmp_path / 'run'}")
    assert "stackwise_jax.evaluate" in capsys.readouterr().err
