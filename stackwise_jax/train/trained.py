"""Reading a run folder alone: the rack as it stands, for generation and evaluation."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

from stackwise_jax.data.tokenizer import Tokenizer, load_tokenizer
from stackwise_jax.errors import UserError
from stackwise_jax.memory.placement import to_device
from stackwise_jax.models.adapters import attach
from stackwise_jax.models.stack import equal_runs, join_stacks
from stackwise_jax.schema import ModelConfig, RunConfig
from stackwise_jax.train.checkpoint import read_tree
from stackwise_jax.train.curriculum import band_stacks, is_depth, make_curriculum
from stackwise_jax.train.folder import Snapshot, newest_sound, part_place, read_snapshot
from stackwise_jax.train.phases import Name, stack_sizes
from stackwise_jax.train.state import Frozen, adapter_name, carried_names, part_names, part_shape, split
from stackwise_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Trained:
    """A rack out of a run folder.

    Attributes:
      rack: {"embedding", "stacks", "head"}, on the device; the stacks that have been trained so far, equal ones merged.
      n_stacks: how many stacks of the config these are.
      corpus_digest: of the corpus that it was trained on.
      step: updates behind it.
      finished: the curriculum has ended.
      taps: folders of the heads as they stood after stacks, where a head lived on.
    """

    config: RunConfig
    tokenizer: Tokenizer
    rack: Params
    n_stacks: int
    corpus_digest: str
    step: int
    finished: bool
    taps: Mapping[int, Path] = dataclasses.field(default_factory=dict)

    def tap(self, stack: int) -> Params | None:
        """The head as it stood after a stack; None where none was written."""
        return read_tap(self.config, self.taps, stack)

    @property
    def model(self) -> ModelConfig:
        return self.config.model


def load_trained(workdir: Path | str, *, n_stacks: int | None = None, entry: int = 0, merged: bool = True) -> Trained:
    """Restores the rack of a run, finished or under way.

    Stacks are read, verified and brought to the device one at a time, so the host never holds the rack.

    Args:
      workdir: the run folder.
      n_stacks: read only the first so many stacks that were trained (from the left, or where the run grew right to left
        from the right), through the head as it was when the last of them was trained.
      entry: number of the stack that the embedding is handed to; those left of it are left out.
      merged: equal neighbours are one stack, so that they compile as one; bands of noise stay apart. Otherwise every
        stack is as it was trained.

    Raises:
      UserError: not a run folder, nothing saved yet, no sound snapshot, a damaged tokenizer or head, a depth that
        has no head of its own, or no stack from `entry` on. A damaged snapshot before a sound one is a warning.
    """
    workdir = Path(workdir)
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir} is not a run folder: config.json is missing")
    found, _ = newest_sound(workdir, functools.partial(_read, workdir, n_stacks, entry, merged))
    if found is None:
        raise UserError(f"{workdir} holds no checkpoint yet; the first is written when its first phase ends")
    trained, tapped = found
    if tapped is None:
        return trained
    return dataclasses.replace(trained, rack={**trained.rack, "head": trained.tap(tapped)})


def settled_rack(config: RunConfig, frozen: Frozen) -> Params:
    """The rack of all that is settled on the device, as `load_trained` merges it."""
    rack = to_device({"embedding": frozen.embedding, "head": frozen.head})

    def shape(number: int) -> Params:
        return part_shape(config, jax.random.key(0), "stacks", str(number))

    rack["stacks"] = _to_device(config, sorted(frozen.stacks), shape, frozen.stacks.__getitem__, frozen.adapters)
    return rack


def tap_folders(workdir: Path, references: Mapping[str, str]) -> dict[int, Path]:
    """Where the tapped heads that a run folder's meta data names lie, by stack."""
    return {int(stack): workdir / "stacks" / reference for stack, reference in references.items()}


def read_tap(config: RunConfig, taps: Mapping[int, Path], stack: int) -> Params | None:
    """Reads the head that was tapped after a stack; None where there is none."""
    if stack not in taps:
        return None
    return to_device(read_tree(taps[stack], part_shape(config, jax.random.key(0), "head", "head")))


def _read(workdir: Path, n_stacks: int | None, entry: int, merged: bool, step: Path) -> tuple[Trained, int | None]:
    """The rack as of a snapshot; and the stack whose tapped head is to read it, where that is not the rack's own."""
    snapshot = read_snapshot(workdir, step, ("embedding", "head", "adapters"))
    config, meta = snapshot.config, snapshot.meta
    tokenizer = load_tokenizer(workdir / "tokenizer.model")
    if tokenizer.digest != meta["tokenizer"]:
        raise UserError(
            f"{workdir / 'tokenizer.model'} is damaged or of another run: its SHA-256 is not the one in "
            f"{step.name}; restore it from a copy, or start the run again: it writes it anew"
        )
    live = _live(snapshot)
    taps = tap_folders(workdir, meta["parts"]["taps"])
    there = sorted({int(name) for name in meta["parts"]["stacks"]} | {name for name in live if isinstance(name, int)})
    chosen, tapped = _chosen(workdir, config, taps, there, n_stacks)
    numbers = [number for number in chosen if number >= entry]
    if entry and not numbers:
        raise UserError(f"--entry={entry}: of {workdir} stacks {chosen[0]} to {chosen[-1]} are read; give one of these")

    adapters = snapshot.frozen.adapters | {n: live[adapter_name(n)] for n in there if adapter_name(n) in live}

    def place(number: int) -> tuple[Path, Params]:
        return part_place(workdir, config, meta, "stacks", str(number))

    def shape(number: int) -> Params:
        return live[number] if number in live else place(number)[1]

    def read(number: int) -> Params:
        return live[number] if number in live else read_tree(*place(number))

    rack = to_device({name: live.get(name, snapshot.frozen.part(name)) for name in ("embedding", "head")})
    rack["stacks"] = _to_device(config, numbers, shape, read, adapters, merged=merged)
    finished = meta["phase"] == len(make_curriculum(config))
    trained = Trained(config, tokenizer, rack, len(numbers), meta["corpus"], meta["step"], finished, taps)
    return trained, tapped


def _live(snapshot: Snapshot) -> dict[Name, Params]:
    """What a run under way trains, in the place of what is frozen, by name."""
    if snapshot.state is None:
        return {}
    phases, index = make_curriculum(snapshot.config), snapshot.meta["phase"]
    inside = snapshot.meta["position"]["phase_step"] > 0
    names = part_names(phases[index]) if inside else carried_names(phases, index)
    return {name: params for name, (params, _) in split(snapshot.state, names).items()}


def _chosen(
    workdir: Path, config: RunConfig, taps: Mapping[int, Path], there: list[int], n_stacks: int | None
) -> tuple[list[int], int | None]:
    """The stacks that were trained first, and the one whose tapped head is to read them; None: the rack's own head."""
    if n_stacks is None or n_stacks == len(there):
        return there, None
    order = list(range(len(stack_sizes(config))))
    chosen = there[:n_stacks]
    if config.training.progressive.direction == "right_to_left":
        order, chosen = order[::-1], there[-n_stacks:]
    if n_stacks <= len(order) and order[n_stacks - 1] in taps:
        return chosen, order[n_stacks - 1]
    if config.training.head != "frozen" or not 0 < n_stacks <= len(there):
        depths = ", ".join(str(depth) for depth, stack in enumerate(order, start=1) if stack in taps) or "none"
        raise UserError(f"--stacks={n_stacks}: {workdir} has heads for depth {depths} and for all {len(there)} stacks")
    return chosen, None


def _to_device(
    config: RunConfig,
    numbers: Sequence[int],
    shape: Callable[[int], Params],
    read: Callable[[int], Params],
    adapters: Mapping[int, Params],
    *,
    merged: bool = True,
) -> list[Params]:
    """Stacks on the device, each read once, with their adapters.

    Args:
      numbers: of the stacks, in order.
      shape: returns a stack's arrays or their shapes.
      read: returns a stack.
      merged: as in `load_trained`.
    """
    begins = {own[0] for own in band_stacks(config)} if is_depth(config) else set()
    apart = [place for place, number in enumerate(numbers) if not merged or number in begins]

    def adapted(number: int, stack: Params) -> Params:
        adapter = adapters.get(number)
        return stack if adapter is None else attach(stack, adapter, config.training.adapters.alpha)

    shapes, stacks = [adapted(number, shape(number)) for number in numbers], []
    for run in equal_runs(shapes, apart=apart):
        own = [numbers[place] for place in run]
        if len(own) == 1:
            stacks.append(to_device(adapted(own[0], read(own[0]))))
        else:
            stacks.append(
                join_stacks(shapes[run.start : run.stop], lambda place, own=own: adapted(own[place], read(own[place])))
            )
    return stacks
