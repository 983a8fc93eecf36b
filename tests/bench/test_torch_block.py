"""The process that measures one block in PyTorch, by a stand-in for it: PyTorch is no dependency of the tests."""

import sys

from stackwise_jax.bench import torch_block

NAMES = ["LlamaDecoderLayer, float32 weights", "LlamaDecoderLayer, bfloat16 weights"]
# Prints a measurement of each name, with the shape that it was given among the figures.
STAND_IN = """
import json, sys
for name in {names}:
    print(json.dumps({{"name": name, "step_seconds": 0.5, "parameters": json.loads(sys.argv[-1])}}), flush=True)
{then}
"""


def command(names: list[str], then: str = "") -> list[str]:
    return [sys.executable, "-c", STAND_IN.format(names=names, then=then)]


def test_the_process_is_told_the_shape_and_its_figures_are_read():
    shape = {"d_model": 64, "n_kv_heads": 1}
    rows = torch_block.run(shape, timeout_seconds=60, command=command(NAMES[::-1]))
    assert rows == [{"name": name, "step_seconds": 0.5, "parameters": shape} for name in NAMES]


def test_what_it_does_not_measure_has_failed():
    dies = command(NAMES[:1], "raise MemoryError('no more')")
    first, second = torch_block.run({}, timeout_seconds=60, command=dies)
    assert first["step_seconds"] == 0.5
    assert second == {"name": NAMES[1], "failed": "MemoryError: no more"}
    hangs = command([], "import time; time.sleep(60)")
    for row in torch_block.run({}, timeout_seconds=1, command=hangs):
        assert row["failed"] == "not done after 1 s"
