"""The benchmark of one block at tiny size."""

import json
from pathlib import Path

import pytest

from stackwise_jax.bench import block
from stackwise_jax.bench.__main__ import main
from stackwise_jax.errors import UserError
from stackwise_jax.memory.budget import block_parameters

TINY = ["--size=tiny", "--seq_len=32", "--batch_size=2", "--steps=2", "--notorch"]


def test_prints_a_row_a_precision_and_counts_the_head_apart(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    path = tmp_path / "figures.json"
    main(["bench", "block", *TINY, "--rows=fp8", "--head", "--set=training.loss_fraction=0.25", f"--json={path}"])
    plain, with_head = json.loads(path.read_text())
    assert (plain["name"], with_head["name"]) == ("fp8", "fp8, with head")
    assert plain["step_seconds"] > 0
    assert with_head["flops"] - plain["flops"] == 2 * 2 * 288 * 32000 * 64 / 4
    assert "fp8, with head" in capsys.readouterr().out


def test_flops_are_six_a_weight_and_token_and_those_of_attention():
    options = block.make_options()
    options(["block", *TINY])
    config = block.make_config(options, [])
    norms = 2 * config.model.d_model
    attention = 3 * 4 * (32 / 2) * 288
    assert block.block_flops(config) == 64 * (6 * (block_parameters(config.model) - norms) + attention)


def test_an_unknown_row_is_refused(capsys: pytest.CaptureFixture[str]):
    options = block.make_options()
    options(["block", *TINY, "--rows=fp9"])
    with pytest.raises(UserError, match="--rows=fp9 must be among"):
        block.main(options)
