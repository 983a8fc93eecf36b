"""One run in two processes is the run in one; only the first of them writes and speaks."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stackwise_jax import config as config_lib
from stackwise_jax.errors import UserError
from stackwise_jax.memory import processes
from stackwise_jax.schema import MeshConfig
from stackwise_jax.train import loop

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from pathlib import Path
from stackwise_jax import config
from stackwise_jax.report import train_and_report
train_and_report(config.from_json(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def losses(folder: Path) -> dict[tuple[int, str], float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], line["kind"]): line["loss"] for line in lines if "loss" in line}


def start(config: Any, folder: Path, name: str, workdir: Path) -> subprocess.Popen[str]:
    """A process of the run, with one device; it has no import hook, which would double its start."""
    (folder / name).write_text(config_lib.to_json(config))
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(folder / name), str(workdir)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True)


def test_two_processes_train_as_one(tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    small = {
        "model__architecture__n_stacks": 1,
        "training__phase_budget": "3 steps",
        "training__embedding_budget": "2 steps",
        "logging__every_steps": 1,
        "checkpoint__every_steps": 2,
    }
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    several = {"mesh__fsdp": 2, "mesh__distributed": True, "mesh__coordinator": f"localhost:{port}"}
    running = []
    for number in (0, 1):
        config = tiny(**small, **several, mesh__processes=2, mesh__process_id=number)
        running.append(start(config, tmp_path, f"{number}.json", tmp_path / "both"))
    loop.run(tiny(**small), tiny_corpus, tmp_path / "alone", say=lambda _: None)
    printed = [process.communicate(timeout=600) for process in running]
    assert [process.returncode for process in running] == [0, 0], printed[0][1][-3000:] + printed[1][1][-3000:]
    alone, both = losses(tmp_path / "alone"), losses(tmp_path / "both")
    assert set(both) == set(alone)
    assert max(abs(both[key] / alone[key] - 1) for key in alone) < 1e-5
    assert "held-out" in printed[0][0]
    assert "held-out" not in printed[1][0] + printed[1][1]
    names = {"config.json", "metrics.jsonl", "plan.txt", "tokenizer.model"}
    assert names <= {path.name for path in (tmp_path / "both").iterdir()}


def test_one_process_agrees_with_itself() -> None:
    assert processes.is_first()
    assert not processes.are_several()
    assert processes.agreed(True)
    assert processes.smallest_bytes(12345) == 12345
    assert processes.first_alone(lambda: 3) == processes.first_before_others(lambda: 3) == 3
    assert processes.own_folder(Path("run")) == Path("run")


def test_processes_that_nobody_started_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(processes.jax.distributed, "initialize", fail)
    monkeypatch.setattr(processes.jax.config, "update", lambda *_: None)
    with pytest.raises(UserError, match=r"mesh.distributed=True.*coordinator_address.*srun"):
        processes.start_processes(MeshConfig(distributed=True))
