"""Stacks of finished runs, one after another as one rack: what a fusion run begins with."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from stackwise_jax.data.tokenizer import Tokenizer
from stackwise_jax.errors import UserError
from stackwise_jax.memory.placement import to_host
from stackwise_jax.memory.precision import from_storage, to_storage
from stackwise_jax.models import weights
from stackwise_jax.models.adapters import merge
from stackwise_jax.models.stack import placed, regroup, stack_size
from stackwise_jax.schema import ModelConfig, RunConfig
from stackwise_jax.train.curriculum import make_curriculum
from stackwise_jax.train.folder import Snapshot, newest_snapshot
from stackwise_jax.train.phases import stack_sizes
from stackwise_jax.types import Params

_SOURCE = re.compile(r"(.+?)(?::(\d+)(?:-(\d+))?)?")


def parse_sources(text: str) -> list[tuple[Path, int, int | None]]:
    """Takes "runs/a; runs/b:4-7; runs/c:2" apart into folders with their first and last stack; None: to the end.

    >>> parse_sources("runs/a; runs/b:4-7")
    [(PosixPath('runs/a'), 0, None), (PosixPath('runs/b'), 4, 7)]

    Raises:
      UserError: no folder is named, or a stretch of stacks runs backwards.
    """
    result = []
    for entry in filter(None, map(str.strip, text.split(";"))):
        match = _SOURCE.fullmatch(entry)
        assert match is not None
        folder, first, last = match.groups()
        begin = int(first or 0)
        end = int(last) if last else None if first is None else begin
        if end is not None and end < begin:
            raise UserError(f"training.fusion.sources names {entry!r}; give the first stack before the last")
        result.append((Path(folder).expanduser(), begin, end))
    if not result:
        raise UserError(
            'training.fusion.sources="" names no run to begin with; give run folders, such as "runs/a; runs/b:4-7"'
        )
    return result


def chosen_stacks(folder: Path, n_stacks: int, first: int, last: int | None) -> range:
    """The stacks of a source of `n_stacks` that are taken; `last` None: to the end.

    Raises:
      UserError: it does not have them.
    """
    end = n_stacks - 1 if last is None else last
    if not first <= end < n_stacks:
        raise UserError(f"training.fusion.sources: {folder} has stacks 0 to {n_stacks - 1}, not {first} to {end}")
    return range(first, end + 1)


def open_source(folder: Path) -> Snapshot:
    """The end of a finished run.

    Raises:
      UserError: no run folder, or not finished.
    """
    if not (folder / "config.json").exists():
        raise UserError(f"training.fusion.sources: {folder} is not a run folder: config.json is missing")
    snapshot, _ = newest_snapshot(folder)
    if snapshot is None or snapshot.meta["phase"] < len(make_curriculum(snapshot.config)):
        raise UserError(f"training.fusion.sources: the run {folder} is not finished; run it to its end first")
    return snapshot


def assemble(config: RunConfig, tokenizer: Tokenizer, say: Callable[[str], None]) -> Iterator[tuple[str, str, Params]]:
    """Yields (kind, name, tree) of every frozen part of the assembled rack, as stored in the trunk's precision.

    The embedding is that of the first source, the head that of the last. Blocks are cut into stacks as the config
    groups them.

    Raises:
      UserError: a source of other shapes or another tokenizer, stacks that a source lacks, another number of blocks
        than the config has, or a head that is tied where the config's is not, or the reverse.
    """
    blocks: list[Params] = []
    opened = []
    for folder, first, last in parse_sources(config.training.fusion.sources):
        snapshot = open_source(folder)
        _require_fitting(folder, snapshot, config, tokenizer)
        chosen = chosen_stacks(folder, len(snapshot.frozen.stacks), first, last)
        blocks += [_stored(snapshot, stack, config.precision.trunk) for stack in chosen]
        opened.append(snapshot)
        say(f"{folder}: stacks {chosen[0]} to {chosen[-1]}")
    sizes, n_blocks = stack_sizes(config), sum(map(stack_size, blocks))
    if sum(sizes) != n_blocks:
        raise UserError(
            f"training.fusion.sources hold {n_blocks} blocks, and model.architecture describes {sum(sizes)}; "
            "set n_stacks and blocks_per_stack to their number"
        )
    if [stack_size(stack) for stack in blocks] != list(sizes):
        blocks = regroup(blocks, sizes)
    head = _part(opened[-1], "head")
    if ("table" in head) == config.model.ties_embedding:
        raise UserError(
            f"training.fusion.sources: the head of {opened[-1].folder.parents[1]} has "
            f"{'a' if 'table' in head else 'no'} table of its own; set model.ties_embedding={'table' not in head}"
        )
    yield "embedding", "embedding", _part(opened[0], "embedding")
    for number, stack in enumerate(blocks):
        yield "stacks", str(number), to_host(placed(stack, config.model, sum(sizes[:number])))
    yield "head", "head", head


def _part(snapshot: Snapshot, name: str) -> Params:
    part = snapshot.frozen.part(name)
    assert part is not None  # a finished run has settled everything
    return part


def _stored(snapshot: Snapshot, stack: int, precision: str) -> Params:
    """A stack of a run with its adapter merged, in a storage precision."""
    frozen, config = snapshot.frozen, snapshot.config
    tree = frozen.stacks[stack]
    if stack not in frozen.adapters and config.precision.trunk == precision:
        return tree
    tree = from_storage(tree, jnp.float32)
    if stack in frozen.adapters:
        tree = merge(tree, frozen.adapters[stack], config.training.adapters.alpha)
    return to_storage(tree, precision)


def _require_fitting(folder: Path, snapshot: Snapshot, config: RunConfig, tokenizer: Tokenizer) -> None:
    if snapshot.meta["tokenizer"] != tokenizer.digest:
        raise UserError(
            f"training.fusion.sources: {folder} was trained with another tokenizer; give its tokenizer.model as "
            "data.tokenizer"
        )
    if _shapes(snapshot.config.model) != _shapes(config.model):
        raise UserError(
            f"training.fusion.sources: the blocks of {folder} have other shapes than those that `model` describes; "
            f"start from its config.json"
        )
    for section in ("kernel", "experts"):
        if _unseen(snapshot.config.model)[section] != _unseen(config.model)[section]:
            raise UserError(
                f"training.fusion.sources: the blocks of {folder} were trained with another model.{section}; start "
                "from its config.json"
            )


def _unseen(model: ModelConfig) -> dict[str, Any]:
    """What no shape of an array tells of what blocks compute: frequencies, and how a router chooses."""
    return {"kernel": model.kernel, "experts": (model.experts.active, model.experts.normalises)}


def _shapes(model: ModelConfig) -> Any:
    tables = (weights.embedding_table(model), weights.block_table(model), weights.head_table(model, tied=True))
    return jax.tree.map(lambda weight: weight.shape, tables, is_leaf=weights.is_weight)
