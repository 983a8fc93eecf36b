"""Folders as `save_pretrained` writes them, made without it."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tokenizers
from cases import CASES, GOLDEN, draw
from safetensors.numpy import load_file, save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "the", "cat", "##s", "and", "dog"]


def tokenizer_json() -> str:
    """A WordPiece tokenizer of fewer pieces than the cases have."""
    own = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    own.normalizer, own.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    own.decoder = decoders.WordPiece(cleanup=False)
    own.add_special_tokens(WORDS[:5])
    return own.to_str()


def weights_of(name: str, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """The drawn weights of a case, by the names of theirs, as a golden file lists them."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        shapes = json.loads(str(file["shapes"]))
    return {weight: draw(weight, tuple(shape)).astype(dtype) for weight, shape in shapes.items()}


def make_folder(
    folder: Path, name: str, *, weights: dict[str, np.ndarray] | None = None, n_shards: int = 1, dtype: Any = np.float32
) -> Path:
    """Writes the folder of a case."""
    weights = weights_of(name, dtype) if weights is None else weights
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CASES[name].config))
    (folder / "tokenizer.json").write_text(tokenizer_json())
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 24}')
    if n_shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = {weight: f"model-{i % n_shards + 1:05d}-of-{n_shards:05d}.safetensors" for i, weight in enumerate(weights)}
    for file in set(files.values()):
        save_file({weight: weights[weight] for weight, own in files.items() if own == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """All weights of a folder, whatever files they lie in."""
    return {name: array for path in folder.glob("*.safetensors") for name, array in load_file(path).items()}


BFLOAT16 = ml_dtypes.bfloat16
