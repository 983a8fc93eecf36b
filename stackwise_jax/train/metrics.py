"""What a run says while it runs: JSON lines always, TensorBoard when installed, and a progress line for people."""

import contextlib
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from stackwise_jax.errors import warn
from stackwise_jax.memory.budget import readable_bytes, readable_count
from stackwise_jax.train.checkpoint import write_text

# Dense bf16 peak of a device, FLOP/s, by a part of the name that JAX reports (vendors' data sheets).
PEAK_FLOPS = {
    "H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12, "T4": 65e12, "V100": 125e12,
    "4090": 165e12, "3090": 71e12, "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6": 918e12,
}  # fmt: skip

FP8_DEVICES = ("H200", "H100", "L4", "4090")


def peak_flops(configured: float | None, n_devices: int = 1, *, in_fp8: bool = False) -> float | None:
    """The FLOP/s of some devices, which MFU is a share of; None where nothing says those of one.

    Args:
      configured: of one device; None: by its name.
      in_fp8: matmuls are in fp8, which the devices of `FP8_DEVICES` do at twice the rate.
    """
    kind = jax.devices()[0].device_kind.lower()
    listed = next((peak for name, peak in PEAK_FLOPS.items() if name.lower() in kind), None)
    if listed is not None and in_fp8 and any(name.lower() in kind for name in FP8_DEVICES):
        listed *= 2
    peak = configured if configured is not None else listed
    return None if peak is None else peak * n_devices


def device_memory() -> int | None:
    """Bytes in use on the first device of this process; None where the backend does not say (CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["bytes_in_use"] if stats else None


def host_memory(field: str = "VmRSS") -> int | None:
    """Resident bytes of this process, or their peak (VmHWM); None where the system does not say."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith(f"{field}:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def memory_figures() -> dict[str, int]:
    """The most memory that this process has taken so far: of its first device, by the allocator, and of the host."""
    stats, host = jax.local_devices()[0].memory_stats(), host_memory("VmHWM")
    figures = {"device_peak_bytes": stats["peak_bytes_in_use"] if stats else None, "host_peak_bytes": host}
    return {name: count for name, count in figures.items() if count is not None}


class MetricsWriter:
    """Appends to `metrics.jsonl`; every object has a `step` and a `kind`."""

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        """Opens the file and drops what a continued run is about to write again: lines after `resume_step`.

        Of that step itself a run may evaluate once more, with the same result; it is not written twice.
        """
        self._path = folder / "metrics.jsonl"
        text = self._path.read_text(encoding="utf-8", errors="replace") if self._path.exists() else ""
        kept = [line for line in text.splitlines(keepends=True) if _step_of(line) <= resume_step]
        write_text(self._path, "".join(kept))
        self._resume_step = resume_step
        self._known = [_key_of(json.loads(line)) for line in kept if _step_of(line) == resume_step]
        self._file = self._path.open("ab", buffering=0)
        self._unwritten = b""
        self._board_folder = folder / "tensorboard"

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Writes one object; numbers also go to TensorBoard as `kind/name`. A full disk gets it when it has room."""
        entry = {"kind": kind, "step": step, **values}
        if step == self._resume_step and _key_of(entry) in self._known:
            return
        self._unwritten += json.dumps(entry).encode() + b"\n"
        with contextlib.suppress(OSError):
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        try:
            if self._board is not None:
                self._board.write(step, {f"{kind}/{name}": value for name, value in numbers.items()})
        except OSError as error:
            warn(f"TensorBoard files end at step {step}: {error.strerror or error}; metrics.jsonl goes on")
            self._board = None

    def close(self) -> None:
        """Closes every file; nothing may be written after it."""
        self._file.close()

    @functools.cached_property
    def _board(self) -> "_Board | None":
        """The TensorBoard writer, made with the first value; None where the extra is not installed."""
        try:
            return _Board(self._board_folder, self._resume_step + 1)
        except ImportError:
            return None


class _Board:
    """TensorBoard event files, written at once: the library's own thread would die of a full disk and block the run."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Opens a file that hides what earlier files say from `first_step` on."""
        from tensorboardX import event_file_writer, summary  # pyright: ignore[reportMissingImports]
        from tensorboardX.proto import event_pb2  # pyright: ignore[reportMissingImports]

        folder.mkdir(exist_ok=True)
        self._writer = event_file_writer.EventsWriter(str(folder / "events"))
        self._scalar = summary.scalar
        self._pb2: Any = event_pb2
        log = self._pb2.SessionLog(status=self._pb2.SessionLog.START)
        self._writer.write_event(self._pb2.Event(step=first_step, session_log=log))

    def write(self, step: int, values: dict[str, int | float]) -> None:
        now = time.time()
        for name, value in values.items():
            summary = self._scalar(name, value)
            self._writer.write_event(self._pb2.Event(wall_time=now, step=step, summary=summary))
        self._writer.flush()


def _key_of(entry: dict[str, Any]) -> tuple[Any, Any, Any]:
    return entry.get("kind"), entry["step"], entry.get("phase")


def _step_of(line: str) -> float:
    """The step of a line; infinite for one that a power cut left unfinished or filled with zeros."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


@dataclasses.dataclass
class PhaseClock:
    """What has happened in a phase since its last log line."""

    logged: int
    data_seconds: float = 0.0
    is_first: bool = True
    losses: dict[str, float] = dataclasses.field(default_factory=dict)  # the last one of each branch

    def restart(self, logged: int) -> None:
        self.logged, self.data_seconds, self.is_first = logged, 0.0, False


class Stopwatch:
    """Seconds that the parts of a phase took, of those done in this process."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._mark = time.perf_counter()

    def lap(self, name: str) -> None:
        """Ends a part."""
        now = time.perf_counter()
        self.seconds[name], self._mark = now - self._mark, now

    def figures(self) -> dict[str, float]:
        return {f"{name}_seconds": seconds for name, seconds in self.seconds.items()}


class Progress:
    """The live line: phase, step, loss, tokens/s, ETA, MFU, memory, share of time waiting for data.

    On a terminal one line is rewritten; elsewhere (a log file) a line is printed every few seconds.
    """

    LOG_SECONDS = 5.0

    def __init__(self, *, total_flops: float, peak: float | None) -> None:
        self._total_flops, self._peak = total_flops, peak
        self._is_terminal = sys.stderr.isatty()
        self._shown_at = 0.0
        self._done_flops = self._run_seconds = 0.0
        self._mark = time.perf_counter()

    def start_clock(self, flops: float) -> None:
        """Leaves what happened since the last call, work of `flops` with compilation, out of the rates."""
        self.count(flops)
        self._mark = time.perf_counter()

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """Leaves what happens inside (saving, evaluating) out of the rates."""
        started = time.perf_counter()
        yield
        self._mark += time.perf_counter() - started

    def measure(self, flops: float, tokens: int, data_seconds: float) -> dict[str, float]:
        """Rates since the last call for that much work."""
        now = time.perf_counter()
        seconds = max(now - self._mark, 1e-9)
        self._mark = now
        self._done_flops += flops
        self._run_seconds += seconds
        rates = {
            "tokens_per_second": tokens / seconds,
            "data_share": min(1.0, data_seconds / seconds),
            "eta_seconds": (self._total_flops - self._done_flops) * self._run_seconds / max(self._done_flops, 1.0),
        }
        if self._peak is not None:
            rates["mfu"] = flops / seconds / self._peak
        return rates

    def count(self, flops: float) -> None:
        """Counts untimed work (by an earlier process, in a cache), so that the ETA does not expect it again."""
        self._total_flops -= flops

    def show(self, phase: str, step: int, steps: int, losses: dict[str, float], rates: dict[str, float]) -> None:
        """Shows the line, or leaves it out where the last one is too recent for a log file.

        Args:
          losses: the last loss of each branch of the phase, by name.
        """
        now = time.monotonic()
        if not self._is_terminal and now - self._shown_at < self.LOG_SECONDS:
            return
        self._shown_at = now
        device, host = device_memory(), host_memory()
        parts = [
            f"{phase} {step}/{steps}",
            "loss " + ", ".join((f"{name} " if len(losses) > 1 else "") + f"{own:.3f}" for name, own in losses.items()),
        ]
        if rates:
            parts.append(f"{readable_count(rates['tokens_per_second'])} tok/s")
            parts.append(f"eta {readable_time(rates['eta_seconds'])}")
        if "mfu" in rates:
            parts.append(f"mfu {100 * rates['mfu']:.1f}%")
        parts.append(f"mem {readable_bytes(device) + ' dev, ' if device else ''}{readable_bytes(host or 0)} host")
        if rates:
            parts.append(f"data {100 * rates['data_share']:.0f}%")
        self._print("  ".join(parts), stays=False)

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        self._print(text, stays=True)

    def note(self, text: str) -> None:
        """Shows passing work (filling a cache, evaluating) on the live line; silent off a terminal."""
        if self._is_terminal:
            self._print(text, stays=False)

    def _print(self, text: str, *, stays: bool) -> None:
        if not self._is_terminal:
            print(text, file=sys.stderr, flush=True)
            return
        print(f"\r\x1b[2K{text}", end="\n" if stays else "", file=sys.stderr, flush=True)


def readable_time(seconds: int | float) -> str:
    """3725 -> "1h02m"."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
