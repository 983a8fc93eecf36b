"""The files that `transformers` keeps a tokenizer in, and the tokenizer of a run."""

import json
import shutil
from pathlib import Path
from typing import Any

from stackwise_jax.data.json_tokenizer import JsonTokenizer, import_tokenizers
from stackwise_jax.data.tokenizer import Tokenizer, open_tokenizer
from stackwise_jax.errors import UserError
from stackwise_jax.interop.configs import TOKEN_IDS
from stackwise_jax.train.checkpoint import write_bytes, write_text

# Besides the vocabulary itself: kept with an imported run, and put back when it is exported.
COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
KEPT = "tokenizer_files"
"""Folder of a run that holds them."""


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder: a SentencePiece model of ours, a `tokenizer.json`, a WordPiece or a GPT-2 vocabulary.

    Raises:
      UserError: there is none, or none that we can read.
    """
    own = folder / "tokenizer.model"
    if own.exists():
        try:
            return open_tokenizer(own.read_bytes(), name=str(own))
        except UserError as error:  # LLaMA 2's puts a space before texts; its tokenizer.json is read then
            unfit = error
            if not (folder / "tokenizer.json").exists():
                raise UserError(f"{unfit}; or give a tokenizer.json beside it") from None
    if (folder / "tokenizer.json").exists():
        return JsonTokenizer((folder / "tokenizer.json").read_bytes(), name=str(folder / "tokenizer.json"))
    if (folder / "vocab.txt").exists():
        return JsonTokenizer(_wordpiece(folder), name=str(folder / "vocab.txt"))
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return JsonTokenizer(_byte_level(folder), name=str(folder / "vocab.json"))
    raise UserError(
        f"{folder} has no tokenizer: tokenizer.json, tokenizer.model, vocab.txt, or vocab.json with merges.txt"
    )


def _entries(path: Path) -> dict[str, Any]:
    """A small JSON file; empty where there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _wordpiece(folder: Path) -> bytes:
    """BERT's vocabulary file as a `tokenizer.json`."""
    lowercase = _entries(folder / "tokenizer_config.json").get("do_lower_case", True)
    own = import_tokenizers().implementations.BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=lowercase)
    own.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return own.to_str().encode()


def _byte_level(folder: Path) -> bytes:
    """GPT-2's pair of files as a `tokenizer.json`."""
    own = import_tokenizers().implementations.ByteLevelBPETokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), add_prefix_space=False
    )
    own.add_special_tokens(["<|endoftext|>"])
    return own.to_str().encode()


def keep_companions(source: Path, run: Path) -> None:
    """Copies what else belongs to a tokenizer into a run."""
    for name in COMPANIONS:
        if (source / name).is_file():
            (run / KEPT).mkdir(exist_ok=True)
            shutil.copyfile(source / name, run / KEPT / name)


def write_tokenizer(tokenizer: Tokenizer, run: Path, target: Path) -> None:
    """Writes a run's tokenizer as `AutoTokenizer` reads it, with what came with it.

    A SentencePiece model is written as it is, and as the `tokenizer.json` that stands for it.
    """
    if isinstance(tokenizer, JsonTokenizer):
        write_bytes(target / "tokenizer.json", tokenizer.model)
    else:
        write_bytes(target / "tokenizer.model", tokenizer.model)
        write_bytes(target / "tokenizer.json", sentencepiece_as_json(tokenizer))
    words = _words(tokenizer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **words}
    write_text(target / "tokenizer_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in COMPANIONS:
        if (run / KEPT / name).is_file():
            shutil.copyfile(run / KEPT / name, target / name)


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the special tokens that a tokenizer has, as a `config.json` names them."""
    named = _roles(tokenizer)
    ids = {f"{role}_token_id": number for role, number in named.items()}
    if "[CLS]" in _words(tokenizer).values():
        ids |= {"cls_token_id": tokenizer.cls_id, "sep_token_id": tokenizer.sep_id}
    return {name: ids[name] for name in TOKEN_IDS if name in ids}


def _roles(tokenizer: Tokenizer) -> dict[str, int]:
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer.named
    return {
        "pad": tokenizer.pad_id,
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "unk": tokenizer.unk_id,
        "mask": tokenizer.mask_id,
    }


def _words(tokenizer: Tokenizer) -> dict[str, str]:
    """{"pad_token": "<pad>"} and so on."""
    words = {f"{role}_token": tokenizer.piece(number) for role, number in _roles(tokenizer).items()}
    pair = {"cls_token": tokenizer.piece(tokenizer.cls_id), "sep_token": tokenizer.piece(tokenizer.sep_id)}
    return words | (pair if pair["cls_token"] == "[CLS]" else {})


def sentencepiece_as_json(tokenizer: Tokenizer) -> bytes:
    """The `tokenizer.json` that encodes as a SentencePiece BPE model of ours does, all texts without U+2581.

    The model merges the pair whose joined piece has the highest score; a `tokenizer.json` lists pairs in that order.
    """
    tokenizers = import_tokenizers()
    pieces = [tokenizer.piece(number) for number in range(tokenizer.vocab_size)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    special = [pieces[number] for number in sorted(tokenizer.special_ids)]
    plain = {piece: number for piece, number in vocabulary.items() if piece not in special}
    merges = [
        (tokenizer.score(number), (piece[:cut], piece[cut:]))
        for piece, number in plain.items()
        if not (piece.startswith("<0x") and len(piece) == 6)
        for cut in range(1, len(piece))
        if piece[:cut] in plain and piece[cut:] in plain
    ]
    merges.sort(key=lambda merge: (-merge[0], vocabulary[merge[1][0]], vocabulary[merge[1][1]]))
    own = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocabulary, [pair for _, pair in merges], unk_token=pieces[tokenizer.unk_id], byte_fallback=True
        )
    )
    own.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    own.pre_tokenizer = tokenizers.pre_tokenizers.Split("\n", "isolated")  # nothing merges with a newline
    own.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    own.add_special_tokens(special)
    return own.to_str().encode()
