"""Reading a run folder alone: the rack as it stands, for generation and evaluation."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax

from stackwise_jax.data.tokenizer import Tokenizer, load_tokenizer
from stackwise_jax.errors import UserError
from stackwise_jax.memory.placement import to_device
from stackwise_jax.schema import ModelConfig, RunConfig
from stackwise_jax.train.checkpoint import read_tree
from stackwise_jax.train.curriculum import make_curriculum
from stackwise_jax.train.folder import Snapshot, newest_snapshot
from stackwise_jax.train.phases import stack_sizes
from stackwise_jax.train.state import adapter_name, carried_names, part_names, part_shape, split
from stackwise_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Trained:
    """A rack out of a run folder.

    Attributes:
      rack: {"embedding", "stacks", "head"}; the stacks that have been trained so far.
      corpus_digest: of the corpus that it was trained on.
      step: updates behind it.
      finished: the curriculum has ended.
      taps: folders of the heads as they stood after stacks, where a head lived on.
    """

    config: RunConfig
    tokenizer: Tokenizer
    rack: Params
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


def load_trained(workdir: Path | str, *, n_stacks: int | None = None) -> Trained:
    """Restores the rack of a run, finished or under way.

    Args:
      workdir: the run folder.
      n_stacks: read only the first so many stacks that were trained (from the left, or where the run grew right to left
        from the right), through the head as it was when the last of them was trained.

    Raises:
      UserError: not a run folder, nothing saved yet, no sound snapshot, a damaged tokenizer or head, or a depth that
        has no head of its own. A damaged snapshot before a sound one is a warning.
    """
    workdir = Path(workdir)
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir} is not a run folder: config.json is missing")
    snapshot, _ = newest_snapshot(workdir)
    if snapshot is None:
        raise UserError(f"{workdir} holds no checkpoint yet; the first is written when its first phase ends")
    config, meta = snapshot.config, snapshot.meta
    tokenizer = load_tokenizer(workdir / "tokenizer.model")
    if tokenizer.digest != meta["tokenizer"]:
        raise UserError(
            f"{workdir / 'tokenizer.model'} is damaged or of another run: its SHA-256 is not the one in "
            f"{snapshot.folder.name}; restore it from a copy, or start the run again: it writes it anew"
        )
    rack = _assemble(snapshot)
    if n_stacks is not None and n_stacks != len(rack["stacks"]):
        rack = _cut(workdir, config, meta, rack, n_stacks)
    finished = meta["phase"] == len(make_curriculum(config))
    taps = tap_folders(workdir, meta["parts"]["taps"])
    return Trained(config, tokenizer, rack, meta["corpus"], meta["step"], finished, taps)


def tap_folders(workdir: Path, references: Mapping[str, str]) -> dict[int, Path]:
    """Where the tapped heads that a run folder's meta data names lie, by stack."""
    return {int(stack): workdir / "stacks" / reference for stack, reference in references.items()}


def read_tap(config: RunConfig, taps: Mapping[int, Path], stack: int) -> Params | None:
    """Reads the head that was tapped after a stack; None where there is none."""
    if stack not in taps:
        return None
    return to_device(read_tree(taps[stack], part_shape(config, jax.random.key(0), "head", "head")))


def _assemble(snapshot: Snapshot) -> Params:
    """The rack: frozen parts, and what is live in the place of them."""
    frozen = dataclasses.replace(
        snapshot.frozen, stacks=snapshot.frozen.stacks.copy(), adapters=dict(snapshot.frozen.adapters)
    )
    if snapshot.state is not None:
        phases, index = make_curriculum(snapshot.config), snapshot.meta["phase"]
        inside = snapshot.meta["position"]["phase_step"] > 0
        names = part_names(phases[index]) if inside else carried_names(phases, index)
        live = {name: params for name, (params, _) in split(snapshot.state, names).items()}
        frozen.stacks.update({name: params for name, params in live.items() if isinstance(name, int)})
        frozen.adapters |= {
            stack: live[adapter_name(stack)] for stack in phases[index].adapter_stacks if adapter_name(stack) in live
        }
        frozen.embedding = live.get("embedding", frozen.embedding)
        frozen.head = live.get("head", frozen.head)
    return to_device(frozen.rack(snapshot.config.training.adapters.alpha))


def _cut(workdir: Path, config: RunConfig, meta: dict, rack: Params, n_stacks: int) -> Params:
    """The stacks that were trained first, with the head that was tapped after them."""
    taps = tap_folders(workdir, meta["parts"]["taps"])
    order = list(range(len(stack_sizes(config))))
    stacks = rack["stacks"][:n_stacks]
    if config.training.progressive.direction == "right_to_left":
        order, stacks = order[::-1], rack["stacks"][-n_stacks:]
    head = read_tap(config, taps, order[n_stacks - 1]) if n_stacks <= len(order) else None
    if head is not None:
        return {**rack, "stacks": stacks, "head": head}
    if config.training.head != "frozen" or not 0 < n_stacks <= len(rack["stacks"]):
        depths = ", ".join(str(depth) for depth, stack in enumerate(order, start=1) if stack in taps) or "none"
        raise UserError(
            f"--stacks={n_stacks}: {workdir} has heads for depth {depths} and for all {len(rack['stacks'])} stacks"
        )
    return {**rack, "stacks": stacks}
