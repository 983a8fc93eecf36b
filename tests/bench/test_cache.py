"""`bench cache` at tiny size: every tier runs and agrees, and a tier that does not agree is an error."""

import dataclasses
import json
from pathlib import Path

import pytest
from absl import flags

from stackwise_jax.bench import cache
from stackwise_jax.errors import UserError

TINY = ["--stacks=2", "--d_model=64", "--seq_len=32", "--batch_size=4", "--rows=32", "--steps=8", "--precision=fp32"]


def options_of(*arguments: str) -> flags.FlagValues:
    options = cache.make_options()
    options(["cache", *TINY, *arguments])
    return options


def test_tiers_run_and_agree(tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    written = tmp_path / "cache.json"
    sets = [f"data.source={tiny_text}/*.txt", f"data.cache_dir={tmp_path}", "model.vocab_size=320"]
    sets += ["data.validation_fraction=0.2", "training.loss_chunk_tokens=128", "cache.chunk_bytes=70000"]
    tiers = "--tiers=device,host,disk"
    cache.main(options_of(tiers, "--cache=fp32", f"--json={written}", *(f"--set={field}" for field in sets)))
    *_, device, host, disk, verdict = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in (device, host, disk)] == ["device", "host", "disk"]
    assert " 0.0% " in device
    assert verdict == "losses of all 17 steps differ between tiers by at most 0 nats"
    found = json.loads(written.read_text())["tiers"]
    assert [len(tier["step_seconds"]) for tier in found] == [6, 6, 6]  # two cached phases, 5 of 8 steps warm-up
    assert [len(tier["advance_seconds"]) for tier in found] == [1, 1, 1]
    assert found[0]["cache_bytes"] == 32 * 32 * 64 * 4


def test_tiers_that_disagree_are_seen():
    figures = cache.Figures("device", 1, [1.0], 1.0, [1.0], [2.0, 1.0])
    assert cache.largest_difference(figures, dataclasses.replace(figures, losses=[2.0, 1.5])) == 0.5
    for losses in ([2.0], [2.0, float("nan")]):
        assert cache.largest_difference(figures, dataclasses.replace(figures, losses=losses)) == float("inf")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tiers=device,hots"], ["--tiers=hots", 'Did you mean "host"']),
        (["--d_model=100"], ["--d_model=100", "multiple of 64"]),
        (["--cache=int8"], ["precision.cache", "int8"]),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], words: list[str]):
    with pytest.raises(UserError) as caught:
        cache.main(options_of(*arguments))
    assert all(word in str(caught.value) for word in words)
