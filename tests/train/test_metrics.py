"""What a run writes about itself."""

import json
import time
import types
from pathlib import Path
from typing import Any

import pytest

from stackwise_jax.train import metrics
from stackwise_jax.train.metrics import MetricsWriter, Progress, readable_time


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_after_the_resumed_step_are_written_again(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resume_step=0)
    for step in range(1, 6):
        writer.write("train", step, {"loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('[]\n\0\0\0\n{"kind": "train", "st')  # what a power cut may leave
    writer = MetricsWriter(tmp_path, resume_step=3)
    writer.write("train", 4, {"loss": 40.0})
    writer.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_tensorboard_files_appear_where_it_is_installed(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resume_step=0)
    writer.write("train", 1, {"loss": 2.5, "phase": "stack_0000"})
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_without_tensorboard_json_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    writer = MetricsWriter(tmp_path, resume_step=0)
    writer.write("train", 1, {"loss": 2.5})
    writer.close()
    assert lines(tmp_path) == [{"kind": "train", "step": 1, "loss": 2.5}]
    assert not (tmp_path / "tensorboard").exists()


def test_eta_comes_from_the_work_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    progress = Progress(total_flops=1000.0, peak=50.0)
    progress.count(100.0)  # done by an earlier process
    now[0] += 10.0
    progress.start_clock(100.0)  # compiling: its time says nothing
    now[0] += 4.0
    with progress.untimed():
        now[0] += 60.0
    rates = progress.measure(100.0, tokens=800, data_seconds=1.0)
    assert rates["tokens_per_second"] == pytest.approx(200.0)
    assert rates["mfu"] == pytest.approx(100.0 / 4.0 / 50.0)
    assert rates["data_share"] == pytest.approx(0.25)
    assert rates["eta_seconds"] == pytest.approx(700.0 / 25.0)


def test_a_log_file_is_not_flooded(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(total_flops=1.0, peak=None)
    rates = {"tokens_per_second": 1234.0, "data_share": 0.5, "eta_seconds": 60.0}
    for step in range(20):
        now[0] += 1.0
        progress.show("stack_0001", step, 20, {"clm": 2.0}, rates)
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 4
    assert shown[0].startswith("stack_0001 0/20  loss 2.000  1.23k tok/s  eta 1m00s  mem ")


def test_the_peak_is_configured_or_known_or_absent() -> None:
    assert metrics.peak_flops(5e12) == 5e12
    assert metrics.peak_flops(5e12, 8) == 40e12
    assert metrics.peak_flops(None) is None  # a CPU is not in the table


def test_the_peak_in_fp8_is_twice_that_of_devices_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, factor in (("NVIDIA H100 80GB HBM3", 2), ("NVIDIA A100-SXM4-40GB", 1)):
        monkeypatch.setattr(metrics.jax, "devices", lambda own=kind: [types.SimpleNamespace(device_kind=own)])
        assert metrics.peak_flops(None, in_fp8=True) == factor * (metrics.peak_flops(None) or 0.0)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (59.6, "1m00s"), (3725, "1h02m"), (-3, "0s")])
def test_times_for_people(seconds: float, text: str) -> None:
    assert readable_time(seconds) == text


def test_a_full_disk_gets_its_lines_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes nothing, then ten bytes, then everything."""
    writer = MetricsWriter(tmp_path, resume_step=0)
    file, room = writer._file, [0, 10]

    class Full:
        def write(self, content: bytes) -> int:
            left = room.pop(0) if room else len(content)
            if not left:
                raise OSError(28, "No space left on device")
            return file.write(content[:left])

    writer._file = Full()
    for step in range(1, 4):
        writer.write("train", step, {"loss": float(step)})
    file.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_what_was_measured_at_the_resumed_step_is_not_written_twice(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        writer = MetricsWriter(tmp_path, resume_step=3)
        writer.write("held_out", 3, {"phase": "stack_0000", "loss": loss})
        writer.write("held_out", 3, {"phase": "stack_0001", "loss": loss})
        writer.write("held_out", 4, {"phase": "stack_0001", "loss": loss})
        writer.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(3, 1.0), (3, 1.0), (4, 2.0)]


def test_a_full_disk_ends_tensorboard_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics._Board, "write", full)
    writer = MetricsWriter(tmp_path, resume_step=0)
    for step in (1, 2):
        writer.write("train", step, {"loss": 2.5})
    writer.close()
    assert len(lines(tmp_path)) == 2
    assert capsys.readouterr().err == (
        "warning: TensorBoard files end at step 1: No space left on device; metrics.jsonl goes on\n"
    )


def test_branches_that_take_turns_are_shown_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(total_flops=1.0, peak=None).show("bands", 4, 20, {"band_0": 2.5, "band_1": 2.0}, {})
    assert capsys.readouterr().err.startswith("bands 4/20  loss band_0 2.500, band_1 2.000  mem ")
