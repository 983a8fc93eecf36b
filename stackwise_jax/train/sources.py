"""What a run begins with that others have trained: stacks one after another as one rack, or a token table alone."""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from stackwise_jax.data.tokenizer import Tokenizer
from stackwise_jax.errors import UserError
from stackwise_jax.memory.placement import to_host
from stackwise_jax.memory.precision import from_storage, to_storage
from stackwise_jax.models import weights
from stackwise_jax.models.adapters import merge
from stackwise_jax.models.rack import init_embedding
from stackwise_jax.models.stack import placed, regroup, stack_size
from stackwise_jax.schema import ModelConfig, RunConfig
from stackwise_jax.train.curriculum import make_curriculum
from stackwise_jax.train.folder import PART_KINDS, Snapshot, newest_sound, read_snapshot
from stackwise_jax.train.phases import stack_sizes
from stackwise_jax.types import Params

_TABLE_ROWS = 8192  # of a token table that are widened to 64 bits at once
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


def open_source(folder: Path, *, field: str = "training.fusion.sources", kinds: Sequence[str] = PART_KINDS) -> Snapshot:
    """The end of a finished run.

    Args:
      field: that names the folder.
      kinds: of the frozen parts that are read.

    Raises:
      UserError: no run folder, or not finished.
    """
    if not (folder / "config.json").exists():
        raise UserError(f"{field}: {folder} is not a run folder: config.json is missing")
    if list(folder.glob("*.safetensors")):
        raise UserError(
            f"{field}: {folder} is a folder of transformers; make a run of it first: "
            f"python -m stackwise_jax.convert --from={folder} --to=runs/{folder.name}"
        )
    snapshot, _ = newest_sound(folder, functools.partial(read_snapshot, folder, kinds=kinds))
    if snapshot is None or snapshot.meta["phase"] < len(make_curriculum(snapshot.config)):
        raise UserError(f"{field}: the run {folder} is not finished; run it to its end first")
    return snapshot


def given_parts(
    config: RunConfig, tokenizer: Tokenizer, say: Callable[[str], None]
) -> Iterator[tuple[str, str, Params]]:
    """Yields (kind, name, tree) of what a run begins with besides its seed; nothing, where that is all.

    Raises:
      UserError: see `assemble` and `given_embedding`.
    """
    if config.training.mode == "fusion":
        yield from assemble(config, tokenizer, say)
    elif config.training.embedding_from:
        yield "embedding", "embedding", given_embedding(config, tokenizer, say)


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


def given_embedding(config: RunConfig, tokenizer: Tokenizer, say: Callable[[str], None]) -> Params:
    """The embedding that a run begins with: the token table of `training.embedding_from`, all else as it is drawn.

    Raises:
      UserError: no finished run, another tokenizer, or another number of rows.
    """
    field, model = "training.embedding_from", config.model
    folder = Path(config.training.embedding_from).expanduser()
    snapshot = open_source(folder, field=field, kinds=("embedding",))
    _require_tokenizer(folder, snapshot, tokenizer, field)
    table = np.asarray(_part(snapshot, "embedding")["tokens"])
    rows, width = table.shape
    if rows != model.vocab_size:
        raise UserError(f"{field}: the table of {folder} has {rows} rows; set model.vocab_size={rows}")
    columns = model.d_embedding or model.d_model
    fitted, share = fitted_table(table, columns)
    kept = "" if width <= columns else f", which hold {100 * share:.1f} percent of its squares"
    say(f"{folder}: a table of {rows} x {width} on {columns} columns{kept}")
    return {**to_host(init_embedding(jax.random.key(config.seed), model)), "tokens": fitted}


def fitted_table(table: Float[np.ndarray, "V E"], width: int) -> tuple[Float[np.ndarray, "V D"], float]:
    """A token table at another width, by the linear map that keeps the most of the products between its rows.

    To fewer columns: the principal directions of the rows, not centred, which of all maps to so many columns and back
    have the least squared error (Eckart and Young, 1936). To more: zeros, and every product stays.

    Returns:
      the table, as it is stored where the widths are equal, and which share of its squares it holds.
    """
    rows, own = table.shape
    if own <= width:
        return np.pad(table, ((0, 0), (0, width - own))), 1.0
    products = np.zeros((own, own))
    for first in range(0, rows, _TABLE_ROWS):
        some = table[first : first + _TABLE_ROWS].astype(np.float64)
        products += some.T @ some
    squares, directions = np.linalg.eigh(products)  # ascending
    directions = directions[:, ::-1][:, :width]
    largest = np.argmax(np.abs(directions), axis=0)
    directions = directions * np.sign(directions[largest, np.arange(width)])[None, :]  # the same on every machine
    share = float(squares[::-1][:width].sum() / max(squares.sum(), 1e-300))
    return (table @ directions.astype(np.float32)).astype(np.float32), share


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


def _require_tokenizer(folder: Path, snapshot: Snapshot, tokenizer: Tokenizer, field: str) -> None:
    if snapshot.meta["tokenizer"] != tokenizer.digest:
        raise UserError(
            f"{field}: {folder} was trained with another tokenizer; give its tokenizer.model as data.tokenizer"
        )


def _require_fitting(folder: Path, snapshot: Snapshot, config: RunConfig, tokenizer: Tokenizer) -> None:
    _require_tokenizer(folder, snapshot, tokenizer, "training.fusion.sources")
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
