"""Tokenizers of the `tokenizers` package: byte-level BPE (GPT-2, LLaMA 3), BPE with byte fallback (LLaMA 2), WordPiece.

Byte-level BPE is exact, as `data/tokenizer.py` asks: every byte of a text is stood for by one id. The others are not
always. BPE with byte fallback puts a space before a text, one byte more. WordPiece (BERT) may lower case, drop accents
and forget how wide a gap was; its pieces count the bytes of the text as it is read back, words apart by one space, so
bits per byte are of that text. `is_exact` says which it is.
"""

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int, Int32

from stackwise_jax.data.tokenizer import Tokenizer
from stackwise_jax.errors import UserError

# What the public families call their special tokens; the first that a tokenizer has is taken.
ROLES = {
    "pad": ("[PAD]", "<pad>", "<|finetune_right_pad_id|>", "<|padding|>"),
    "bos": ("<s>", "<|begin_of_text|>", "[CLS]", "<|endoftext|>"),
    "eos": ("</s>", "<|end_of_text|>", "[SEP]", "<|endoftext|>"),
    "mask": ("[MASK]", "<mask>"),
    "unk": ("[UNK]", "<unk>"),
}
# Where there is none for padding or masks: pieces of bytes that no UTF-8 text holds, so that no text holds the piece.
_SPARE = {"pad": ("<0xFF>", "\u00ff"), "mask": ("<0xFE>", "\u00fe")}
_WORD_MARK = "\u2581"  # what BPE with byte fallback writes for a space
# Gaps, tokens spelt out, both forms of an accent, what a normaliser would compose, and the rarest characters.
_PROBE = " Two  words,\n\n\ttabs [MASK] </s> caf\u00e9 cafe\u0301 \u6f22\U0001f642 \ufb01\u00a0\x00 "


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`; attributes and methods as those of `Tokenizer`.

    Special tokens are never read out of a text, and none are added to it. `named` are those that the file has, by role;
    the roles that it lacks are played by other ids.
    """

    def __init__(self, model: bytes, *, name: str = "the tokenizer") -> None:
        """Reads the file's bytes.

        Raises:
          UserError: no such file, a kind that is none of the three, no token that begins and ends a text, or none to
            spare for padding and masks; or the `hf` extra is missing.
        """
        tokenizers = import_tokenizers()
        self.model, self.digest = model, hashlib.sha256(model).hexdigest()
        try:
            self._entries: dict[str, Any] = json.loads(model)
            self._tokenizer = tokenizers.Tokenizer.from_str(model.decode())
        except Exception as error:  # the package raises plain Exception for what it cannot read
            reason = (str(error).splitlines() or [""])[0][:160]
            raise UserError(f"{name} is not a tokenizer.json: {reason}") from None
        self.kind = self._kind_of(name)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._pieces: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._pieces.values()) + 1
        self._name_specials(name)
        probe = self.encode(_PROBE)
        self.is_exact = self.decode(probe) == _PROBE and int(self.piece_bytes[probe].sum()) == len(_PROBE.encode())

    def _kind_of(self, name: str) -> str:
        """byte_level, byte_fallback or wordpiece."""
        model = self._entries["model"]
        kind = model.get("type", "BPE" if "merges" in model else None)
        if kind == "WordPiece":
            return "wordpiece"
        if kind == "BPE" and model.get("byte_fallback"):
            return "byte_fallback"
        steps = json.dumps([self._entries["pre_tokenizer"], self._entries["decoder"]])
        if kind == "BPE" and '"ByteLevel"' in steps:
            return "byte_level"
        raise UserError(f"{name} must be byte-level BPE, BPE with byte fallback or WordPiece, not {kind}")

    def _name_specials(self, name: str) -> None:
        added = {token["content"]: token for token in self._entries.get("added_tokens", [])}
        special = {content: token["id"] for content, token in added.items() if token["special"]}
        found = {role: next((special[w] for w in words if w in special), None) for role, words in ROLES.items()}
        self.named = {role: number for role, number in found.items() if number is not None}
        pieces = self._pieces
        spare = {role: next((pieces[w] for w in words if w in pieces), None) for role, words in _SPARE.items()}
        missing = [role for role in ("bos", "eos", "pad", "mask") if found[role] is None and spare.get(role) is None]
        if missing:
            words = "; ".join(f"{role}: {', '.join(ROLES[role])}" for role in missing)
            raise UserError(f"{name} lacks special tokens, or we do not know their names ({words})")
        role_ids = {role: number for role, number in {**spare, **self.named}.items() if number is not None}
        self.pad_id, self.bos_id, self.eos_id = role_ids["pad"], role_ids["bos"], role_ids["eos"]
        self.mask_id, self.unk_id = role_ids["mask"], role_ids.get("unk", -1)
        self.cls_id, self.sep_id = special.get("[CLS]", self.bos_id), special.get("[SEP]", self.eos_id)
        self.special_ids = tuple(sorted({*special.values(), *role_ids.values()}))
        self._added = {token["id"]: content for content, token in added.items()}

    def encode_batch(self, texts: list[str]) -> list[Int32[np.ndarray, "_"]]:
        """Ids of each text, encoded by all cores."""
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(text.ids, dtype=np.int32) for text in encoded]

    def decode(self, ids: Iterable[int | np.integer] | Int[np.ndarray, "_"]) -> str:
        """Text of ids; special ids and ids beyond the vocabulary (a model may have more) stand for nothing."""
        special = frozenset(self.special_ids)
        kept = [i for i in map(int, ids) if 0 <= i < self.vocab_size and i not in special]
        return self._tokenizer.decode(kept, skip_special_tokens=False) if kept else ""

    def piece(self, number: int) -> str:
        """A piece as the file spells it."""
        return self._tokenizer.id_to_token(number)

    @cached_property
    def piece_bytes(self) -> Int32[np.ndarray, "V"]:
        """Bytes of text that each piece stands for; 0 for the special ones. See the module for what is not exact."""
        counts = np.zeros(self.vocab_size, dtype=np.int32)
        for piece, number in self._pieces.items():
            counts[number] = len(self._added[number].encode()) if number in self._added else self._bytes_of(piece)
        counts[list(self.special_ids)] = 0
        return counts

    def _bytes_of(self, piece: str) -> int:
        if self.kind == "byte_level":
            return len(piece)  # one character a byte
        if self.kind == "byte_fallback":
            is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
            return 1 if is_byte else len(piece.replace(_WORD_MARK, " ").encode())
        return len(piece[2:].encode()) if piece.startswith("##") else 1 + len(piece.encode())


def import_tokenizers() -> Any:
    """The `tokenizers` package; UserError where it is not installed."""
    try:
        import tokenizers
    except ImportError:
        raise UserError('a tokenizer.json is read by the package tokenizers: pip install -e ".[hf]"') from None
    return tokenizers
