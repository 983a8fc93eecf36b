"""Reading a run folder alone: the rack as it stands, for generation and evaluation."""

import dataclasses
from pathlib import Path

import jax

from stackwise_jax import config as config_lib
from stackwise_jax.data.tokenizer import Tokenizer, load_tokenizer
from stackwise_jax.errors import UserError
from stackwise_jax.memory.placement import to_device
from stackwise_jax.schema import ModelConfig, RunConfig
from stackwise_jax.train import checkpoint
from stackwise_jax.train.curriculum import make_curriculum, signature
from stackwise_jax.train.state import part_shape, snapshot_shape
from stackwise_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Trained:
    """A rack out of a run folder.

    Attributes:
      rack: {"embedding", "stacks", "head"}; the stacks that have been trained so far.
      corpus_digest: of the corpus that it was trained on.
      step: updates behind it.
      finished: the curriculum has ended.
    """

    config: RunConfig
    tokenizer: Tokenizer
    rack: Params
    corpus_digest: str
    step: int
    finished: bool

    @property
    def model(self) -> ModelConfig:
        return self.config.model


def load_trained(workdir: Path | str, *, n_stacks: int | None = None) -> Trained:
    """Restores the rack of a run, finished or under way.

    Args:
      workdir: the run folder.
      n_stacks: read only that many stacks from the left, through the head as it was when the last of them was trained.

    Raises:
      UserError: not a run folder, nothing saved yet, a damaged checkpoint, or a depth that has no head of its own.
    """
    workdir = Path(workdir)
    config = config_lib.from_json(workdir / "config.json")
    folder = checkpoint.latest_step(workdir)
    if folder is None:
        raise UserError(f"{workdir} holds no checkpoint yet; the first is written when its first phase ends")
    meta = checkpoint.read_meta(folder)
    rack = _assemble(workdir, folder, config, meta)
    if n_stacks is not None and n_stacks != len(rack["stacks"]):
        rack = _cut(workdir, config, meta, rack, n_stacks)
    finished = meta["position"]["phase"] == len(make_curriculum(config))
    digest = (workdir / "corpus.digest").read_text(encoding="utf-8").strip()
    return Trained(config, load_tokenizer(workdir / "tokenizer.model"), rack, digest, meta["step"], finished)


def _assemble(workdir: Path, folder: Path, config: RunConfig, meta: dict) -> Params:
    phases, key = make_curriculum(config), jax.random.key(config.seed)
    frozen = checkpoint.read_frozen(workdir, config, meta["parts"])
    stacks = dict(frozen.stacks)
    live: Params = {}
    index = meta["position"]["phase"]
    if index < len(phases):
        phase = phases[index]
        inside = meta["position"]["phase_step"] > 0
        shape = snapshot_shape(config, key, phase, signature(phase, phases, config), inside=inside)
        live = checkpoint.read_tree(folder, shape).params
        if "stacks" in live:
            stacks |= dict(zip(phase.live_stacks, live["stacks"], strict=True))
    rack = {
        "embedding": live.get("embedding", frozen.embedding),
        "stacks": [stacks[stack] for stack in sorted(stacks)],
        "head": live.get("head", frozen.head),
    }
    return to_device(rack)


def _cut(workdir: Path, config: RunConfig, meta: dict, rack: Params, n_stacks: int) -> Params:
    """The first stacks with the head that was tapped after them."""
    taps = meta["parts"]["taps"]
    reference = taps.get(str(n_stacks - 1))
    head = rack["head"]
    if reference is not None:
        shape = part_shape(config, jax.random.key(0), "head", "head")
        head = to_device(checkpoint.read_tree(workdir / "stacks" / reference, shape))
    elif config.training.head != "frozen" or not 0 < n_stacks <= len(rack["stacks"]):
        depths = ", ".join(str(int(stack) + 1) for stack in sorted(taps, key=int)) or "none"
        raise UserError(
            f"--stacks={n_stacks}: {workdir} has heads for depth {depths} and for all {len(rack['stacks'])} stacks"
        )
    return {**rack, "stacks": rack["stacks"][:n_stacks], "head": head}
