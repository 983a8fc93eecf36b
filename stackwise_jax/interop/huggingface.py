"""A folder of `transformers` becomes a finished run, and a finished run becomes such a folder.

Both stream: one stack, or one shard, is in memory at a time, so that 70B parameters pass through a small machine.
Numbers are kept as they are: 16-bit weights stay 16-bit, and what comes back is what went in, bit for bit.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from stackwise_jax import config as config_lib
from stackwise_jax.data.json_tokenizer import JsonTokenizer
from stackwise_jax.data.tokenizer import Tokenizer, load_tokenizer
from stackwise_jax.errors import UserError
from stackwise_jax.interop import configs, names
from stackwise_jax.interop.kinds import family_of
from stackwise_jax.interop.shards import Shards, write_shards
from stackwise_jax.interop.tokenizer_files import keep_companions, read_tokenizer, special_ids, write_tokenizer
from stackwise_jax.memory.placement import to_host
from stackwise_jax.memory.precision import from_storage
from stackwise_jax.models.adapters import merge
from stackwise_jax.models.stack import stack_size
from stackwise_jax.schema import ModelConfig, RunConfig
from stackwise_jax.train.checkpoint import read_meta, read_part, write_folder, write_text
from stackwise_jax.train.curriculum import make_curriculum
from stackwise_jax.train.folder import RunFolder, committed, make_part
from stackwise_jax.train.phases import stack_sizes
from stackwise_jax.train.position import Position, no_references
from stackwise_jax.train.state import part_shape
from stackwise_jax.types import Params

Say = Callable[[str], None]

SHARD_BYTES = 5 * 10**9
LONGEST_ROW = 1024
OUT_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

# The prefix that a model without its head is saved without.
_PREFIXES = {"bert": "bert.", "modernbert": "model.", "gpt2": "transformer.", "llama": "model."}
# Arrays of theirs that say nothing new: constants, and copies of a tied table.
_REDUNDANT = re.compile(
    r".*\.position_ids|.*\.attn\.(masked_)?bias|.*\.rotary_emb\.inv_freq|lm_head\.weight|decoder\.weight"
    r"|cls\.predictions\.(bias|decoder\.(weight|bias))"
)
# Arrays of tasks that we have no head for.
_LEFT_OUT = re.compile(r"(bert\.)?pooler\..*|cls\.seq_relationship\..*")


class Weights:
    """The arrays of a folder by the names of `names.TABLES`, whatever it calls them; notes which were read."""

    def __init__(self, shards: Shards, family: str) -> None:
        self.shards, self._prefix = shards, _PREFIXES[family]
        self.left = set(shards.names)

    def _name(self, name: str) -> str:
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        for candidate in (name, name.removeprefix(self._prefix), old, old.removeprefix(self._prefix)):
            if candidate in self.shards.names:
                return candidate
        raise UserError(f"the weights lack {name}")

    def dtype(self, name: str) -> str:
        """See `Shards`."""
        return self.shards.dtype(self._name(name))

    def read(self, name: str) -> names.HostArray:
        """See `Shards`."""
        found = self._name(name)
        self.left.discard(found)
        return self.shards.read(found)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run of ours, by its config.json; UserError where it has none."""
    return "model" in _read_json(folder / "config.json")


def import_folder(source: Path, target: Path, say: Say) -> None:
    """Makes a finished run of a folder that `save_pretrained` wrote: one block a stack, stored as it was.

    Args:
      say: told what is left out.

    Raises:
      UserError: see `configs.to_model`, `Shards` and `read_tokenizer`; weights are missing or unexpected; the target
        exists.
    """
    family, fields = configs.to_model(_read_json(source / "config.json"))
    weights = Weights(Shards(source), family)
    tokenizer = read_tokenizer(source)
    config = _run_config(target.name, family, fields, weights)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, and config.json vocab_size={config.model.vocab_size}"
        )
    if isinstance(tokenizer, JsonTokenizer) and not tokenizer.is_exact:
        say(f"note: this {tokenizer.kind} tokenizer changes texts; bits per byte are of texts as it reads them back")
    folder = RunFolder(target, config)
    try:
        folder.require_text("imported", tokenizer.model, tokenizer.digest)
        keep_companions(source, target)
        references = _write_parts(folder, config, family, weights, say)
        _refuse_leftovers(weights, config.model, say)
        position = dataclasses.asdict(Position(phase=1))
        folder.save(0, 1, {}, {"position": position, "parts": references}, [], keep=1, required=True)
        folder.flush()
    except BaseException:
        folder.close()
        shutil.rmtree(target)
        raise
    folder.close()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path.parent} is no folder of transformers: {path.name} is missing") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _run_config(name: str, family: str, fields: dict[str, Any], weights: Weights) -> RunConfig:
    """A run of one phase that trained everything; the trunk's precision is what the blocks are stored in."""
    seq_len = min(fields["max_positions"], LONGEST_ROW)
    entries = {
        "name": name,
        "model": fields,
        "data": {"seq_len": seq_len},
        "objective": {"name": "clm" if fields["attention"] == "causal" else "mlm"},
        "training": {"mode": "end_to_end"},
    }
    model = config_lib.resolve(entries).model
    stored = {"matrices": set(), "vectors": set()}
    table = names.part_table(model, "block")
    for block in range(model.n_blocks):
        for entry in names.part_entries(family, model, "block", block):
            kind = "matrices" if table[entry.ours[0]].is_matrix else "vectors"
            stored[kind].add(weights.dtype(entry.theirs))
    trunk = "fp32"
    if stored["matrices"] | stored["vectors"] == {"bf16"}:
        trunk = "bf16"
    elif stored["matrices"] == {"fp16"}:
        trunk = "fp16"
    compute = "bf16" if trunk == "bf16" else "fp32"
    return config_lib.resolve({**entries, "precision": {"trunk": trunk, "compute": compute}})


def _write_parts(folder: RunFolder, config: RunConfig, family: str, weights: Weights, say: Say) -> Any:
    """Writes every part of the rack; returns the references that a snapshot holds."""
    model, key = config.model, jax.random.key(config.seed)

    def write(kind: str, name: str, item: str, tree: Params) -> str:
        shape = part_shape(config, key, kind, name)
        stored = jax.tree.map(lambda leaf, own: np.asarray(leaf, own.dtype), tree, shape)
        part = make_part(item, stored)
        write_folder(folder.stacks / part.reference, part.tree, {}, part.digests)
        return part.reference

    def read(part: str, block: int = 0) -> Params:
        try:
            return names.from_theirs(family, model, part, weights.read, block)
        except ValueError as error:
            raise UserError(f"the weights do not fit config.json: {error}") from None

    references = no_references()
    references["embedding"] = {"embedding": write("embedding", "embedding", "embedding", read("embedding"))}
    for block in range(model.n_blocks):
        stack = jax.tree.map(lambda leaf: leaf[None], read("block", block))
        references["stacks"][str(block)] = write("stacks", str(block), f"{block:04d}", stack)
        say(f"block {block + 1} of {model.n_blocks}")
    references["head"] = {"head": write("head", "head", "head", read("head"))}
    return references


def _refuse_leftovers(weights: Weights, model: ModelConfig, say: Say) -> None:
    left = {name for name in weights.left if not _REDUNDANT.fullmatch(name)}
    for name in sorted(name for name in left if _LEFT_OUT.fullmatch(name)):
        say(f"left out: {name}, of a task that has no head here")
    unexpected = sorted(name for name in left if not _LEFT_OUT.fullmatch(name))
    if unexpected:
        raise UserError(f"the weights hold {len(unexpected)} array(s) that the model has no place for: {unexpected[0]}")
    tied = [name for name in weights.left if name.endswith(("lm_head.weight", "decoder.weight"))]
    tokens = next(name for name in weights.shards.names if name.endswith(_TOKEN_TABLES))
    for name in tied if model.ties_embedding else []:
        if not np.array_equal(weights.shards.read(name), weights.shards.read(tokens)):
            raise UserError(f"config.json ties the tables, yet {name} differs from {tokens}")


_TOKEN_TABLES = ("word_embeddings.weight", "tok_embeddings.weight", "wte.weight", "embed_tokens.weight")


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A finished run whose parts are read one by one."""

    folder: Path
    config: RunConfig
    tokenizer: Tokenizer
    references: dict[str, dict[str, str]]

    def read(self, kind: str, name: str) -> Params:
        """A part as it is stored, verified."""
        shape = part_shape(self.config, jax.random.key(0), kind, name)
        return read_part(self.folder / "stacks" / self.references[kind][name], shape)[0]

    def read_stack(self, name: str) -> Params:
        """A stack as plain arrays, its adapter merged if it has one."""
        stack, is_adapted = self.read("stacks", name), name in self.references["adapters"]
        if is_adapted or self.config.precision.trunk not in ("fp32", "bf16", "fp16"):
            stack = from_storage(stack, jnp.float32)
        if is_adapted:
            stack = merge(stack, self.read("adapters", name), self.config.training.adapters.alpha)
        return to_host(stack)


def open_finished(folder: Path) -> FinishedRun:
    """Opens a run by its last snapshot; UserError where there is none, or the run has not finished."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is not a run folder: config.json is missing")
    steps = committed(folder / "steps")
    if not steps:
        raise UserError(f"{folder} holds no checkpoint yet")
    meta = read_meta(steps[-1])
    config = config_lib.resolve(meta["config"])
    phases = make_curriculum(config)
    if meta["phase"] < len(phases):
        raise UserError(
            f"{folder} has not finished: phase {phases[meta['phase']].name} is under way; continue the run to its end"
        )
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    if tokenizer.digest != meta["tokenizer"]:
        raise UserError(f"{folder / 'tokenizer.model'} is damaged or of another run; restore it from a copy")
    return FinishedRun(folder, config, tokenizer, meta["parts"])


def export_folder(source: Path, target: Path, *, dtype: str, shard_bytes: int, say: Say) -> None:
    """Writes a finished run as a folder that `AutoModel...from_pretrained` loads.

    Args:
      dtype: a key of `OUT_DTYPES`, or "auto": as the blocks are stored, quantised ones in bfloat16.
      shard_bytes: of a file, at most.

    Raises:
      UserError: no finished run, no family has room for its model, or the target exists.
    """
    run = open_finished(source)
    model = _exported_model(run)
    family = family_of(model)
    if dtype == "auto":
        dtype = {"fp32": "float32", "fp16": "float16"}.get(run.config.precision.trunk, "bfloat16")
    target.mkdir(parents=True)
    try:
        item = np.dtype(OUT_DTYPES[dtype]).itemsize
        sizes = [(name, item * size) for name, size in _their_sizes(family, model)]
        files = write_shards(target, _their_arrays(run, family, model, OUT_DTYPES[dtype]), sizes, shard_bytes)
        ids = special_ids(run.tokenizer)
        entries = configs.to_theirs(family, model, dtype=dtype, ids=ids)
        write_text(target / "config.json", json.dumps(entries, indent=2, sort_keys=True) + "\n")
        write_tokenizer(run.tokenizer, source, target)
    except BaseException:
        shutil.rmtree(target)
        raise
    say(f"{configs.ARCHITECTURES[family]}, {dtype}, {len(files)} file(s) of weights")


def _exported_model(run: FinishedRun) -> ModelConfig:
    """The model as it ended: a head that was untied on the way has a table of its own."""
    model = run.config.model
    return dataclasses.replace(model, ties_embedding=model.ties_embedding and run.config.training.head != "copy")


def _their_sizes(family: str, model: ModelConfig) -> Iterator[tuple[str, int]]:
    """(name, entries) of every array of theirs, in the order of `_their_arrays`."""
    for part, count in (("embedding", 1), ("block", model.n_blocks), ("head", 1)):
        table = names.part_table(model, part)
        for block in range(count):
            for entry in names.part_entries(family, model, part, block):
                yield entry.theirs, sum(table[name].size for name in entry.ours)
    if family == "bert" and not model.ties_embedding:
        yield names.BERT_BIAS, model.vocab_size


def _their_arrays(
    run: FinishedRun, family: str, model: ModelConfig, dtype: Any
) -> Iterator[tuple[str, names.HostArray]]:
    def out(part: str, tree: Params, block: int = 0) -> Iterator[tuple[str, names.HostArray]]:
        for name, array in names.to_theirs(family, model, part, tree, block):
            yield name, np.asarray(array, dtype)

    yield from out("embedding", run.read("embedding", "embedding"))
    block = 0
    for number in range(len(stack_sizes(run.config))):
        stack = run.read_stack(str(number))
        for index in range(stack_size(stack)):
            yield from out("block", jax.tree.map(lambda leaf, i=index: leaf[i], stack), block)
            block += 1
    head = run.read("head", "head")
    yield from out("head", head)
    if family == "bert" and not model.ties_embedding:  # a second name, which transformers keeps and does not read
        yield names.BERT_BIAS, np.asarray(head["logit_bias"], dtype)
