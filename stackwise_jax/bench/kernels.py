"""What a step's time goes to: the device's kernels, traced by JAX's profiler and added up by name."""

import dataclasses
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

TRACED_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Kernels whose names differ only in the numbers at their end.

    Attributes:
      name: without those numbers.
      seconds: in all.
      calls: how many.
      source: the operation of the program behind the costliest of them; empty where the compiler does not say.
    """

    name: str
    seconds: float
    calls: int
    source: str


def trace_kernels(run_step: Callable[[], object], program: str) -> list[Kernels]:
    """Traces `TRACED_STEPS` calls of `run_step` and returns the kernels that ran, the costliest first.

    Args:
      run_step: one step; what it returns is waited for after the last.
      program: the text of the compiled program, which says what each kernel comes from.

    Returns:
      an empty list where the trace has no device of its own, as on a CPU.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            result = None
            for _ in range(TRACED_STEPS):
                result = run_step()
            jax.block_until_ready(result)
        events = [event for file in Path(folder).rglob("*.xplane.pb") for event in _device_events(file)]
    return add_up(events, operation_names(program))


def _device_events(file: Path) -> Iterable[tuple[str, str, float]]:
    """(kernel, instruction of the compiled program, seconds) of everything that ran on a GPU's streams or a TPU."""
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if not line.name.startswith(("Stream", "XLA Ops")):  # other lines say the same again, grouped
                continue
            for event in line.events:
                instruction = dict(event.stats).get("hlo_op", event.name)
                yield event.name, str(instruction), event.duration_ns / 1e9


def operation_names(program: str) -> dict[str, str]:
    """What each instruction of a compiled program's text was made from, by JAX's name for it."""
    found = re.finditer(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', program, re.MULTILINE)
    return {match[1]: match[2] for match in found}


def add_up(events: Iterable[tuple[str, str, float]], operations: dict[str, str]) -> list[Kernels]:
    """Groups (kernel, instruction, seconds) events by the kernel's name, the costliest first."""
    groups: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for kernel, instruction, seconds in events:
        groups[re.sub(r"([._]\d+)+$", "", kernel)].append((seconds, instruction))
    rows = [
        Kernels(name, sum(seconds for seconds, _ in group), len(group), operations.get(max(group)[1], ""))
        for name, group in groups.items()
    ]
    return sorted(rows, key=lambda row: -row.seconds)


def as_text(rows: list[Kernels], *, most: int = 20) -> str:
    """The costliest groups as a table: milliseconds and calls a step, share of all time, what each comes from."""
    if not rows:
        return "the trace has no kernels of a device: a CPU's step cannot be taken apart so"
    total = sum(row.seconds for row in rows)
    lines = [f"{'ms/step':>8} {'share':>6} {'calls':>6}  kernel, and the operation behind the costliest of its kind"]
    for row in rows[:most]:
        milliseconds, share = 1e3 * row.seconds / TRACED_STEPS, row.seconds / total
        lines.append(f"{milliseconds:>8.3f} {share:>6.1%} {row.calls / TRACED_STEPS:>6.0f}  {row.name[:72]}")
        if row.source:
            lines.append(f"{'':>24}{row.source[-112:]}")
    return "\n".join([*lines, f"{1e3 * total / TRACED_STEPS:>8.3f} {1:>6.1%}         all {len(rows)} kinds"])
