"""`bench decode` at tiny size: what it prints, what it counts, what it refuses."""

import json
from pathlib import Path

import pytest
from absl import flags

from stackwise_jax.bench import decode
from stackwise_jax.errors import UserError

TINY = ["--blocks=3", "--d_model=64", "--n_heads=4", "--n_kv_heads=2", "--d_ff=96", "--vocab_size=64", "--repeats=1"]
TINY += ["--batch_size=2", "--prompt=6", "--tokens=4"]


def options_of(*arguments: str) -> flags.FlagValues:
    options = decode.make_options()
    options(["decode", *TINY, *arguments])
    return options


def test_it_measures_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    decode.main(options_of("--precision=nvfp4", f"--json={tmp_path}/out/decode.json"))
    said = capsys.readouterr().out
    assert "3 blocks of width 64 in nvfp4" in said
    assert "ms a token" in said
    assert "% of the copy" in said
    found = json.loads((tmp_path / "out" / "decode.json").read_text())
    matrices = 64 * (2 * 64 + 2 * 32 + 3 * 96)
    blocks = 3 * (matrices * 9 // 16 + 4 * (2 * 64 + 7))  # 4.5 bits; two norms, and a scale for each of seven matrices
    assert found["token_bytes"] == blocks + 2 * 64 * 64  # and the output table in bf16
    assert found["rack_bytes"] == blocks + 4 * (2 * 64 * 64 + 64)  # two tables and a norm in float32
    assert found["store_bytes"] == 2 * 3 * 2 * (6 + 4 - 1) * 2 * 16 * 2
    assert found["program_bytes"] > found["rack_bytes"] + found["store_bytes"]
    assert found["prefill_seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--n_heads=7"], ["model.d_model", "7"]),
        (["--blocks=100000000"], ["--blocks=100000000", "are free; lower"]),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], words: list[str]):
    with pytest.raises(UserError) as caught:
        decode.main(options_of(*arguments))
    assert all(word in str(caught.value) for word in words)
