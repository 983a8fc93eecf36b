"""`bench qlora` at tiny size: the figures that it prints and writes, and what it is not of."""

import json
from pathlib import Path

import pytest
from absl import flags

from stackwise_jax.bench import qlora
from stackwise_jax.errors import UserError

D, F, HEADS, BLOCKS, ROWS, LENGTH, RANK = 48, 64, 6, 3, 2, 16, 2
SHAPE = {"d_model": D, "d_ff": F, "vocab_size": 32}


def options_of(*arguments: str) -> flags.FlagValues:
    options = qlora.make_options()
    sizes = [f"--set=model.{name}={value}" for name, value in SHAPE.items()]
    sizes += [f"--blocks={BLOCKS}", f"--batch_size={ROWS}", f"--seq_len={LENGTH}", f"--rank={RANK}"]
    options(["qlora", "--size=tiny", "--steps=1", *sizes, *arguments])
    return options


def test_it_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    written = tmp_path / "out" / "qlora.json"
    qlora.main(options_of(f"--json={written}"))
    out = capsys.readouterr().out
    assert "3 blocks of width 48 in nvfp4, adapters of rank 2; 2 rows of 16 tokens" in out
    found = json.loads(written.read_text())
    matrices = 4 * D * D + 3 * D * F
    assert found["flops"] == 4 * BLOCKS * (matrices + 2 * D) * ROWS * LENGTH
    # Nine bits for two entries and a float32 scale for each of seven matrices; two norms in float32.
    assert found["rack_bytes"] == BLOCKS * (matrices * 9 // 16 + 4 * (7 + 2 * D))
    assert found["boundary_bytes"] == (BLOCKS + 1) * ROWS * LENGTH * D * 2
    adapters = BLOCKS * RANK * (4 * 2 * D + 3 * (D + F))
    assert found["adapter_bytes"] == 16 * adapters + 4 * BLOCKS  # and a count of each one's updates
    assert found["peak_bytes"] is None
    assert 0 < found["step_seconds"] < found["first_seconds"]
    assert found["loss"] > 0


@pytest.mark.parametrize("change", ["training.fusion.live=all", "training.fusion.embedding=live"])
def test_another_phase_is_refused(change: str):
    with pytest.raises(UserError, match="this benchmark is of"):
        qlora.make_config(options_of(f"--set={change}"))
