"""Text to ids and back without loss: a SentencePiece BPE model with byte fallback and the special pieces we need.

Exactness is the point. Every UTF-8 byte of a text is stood for by exactly one id, so `sum(piece_bytes[encode(text)])`
is the number of its bytes and a loss in nats per token converts to bits per byte. A model that changes text (prefixes,
normalisation, unknown characters) is refused.
"""

import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
from jaxtyping import Float, Int, Int32

from stackwise_jax.errors import UserError

TRAINING_BYTES = 10_000_000
CONTROL_PIECES = ("[MASK]", "[CLS]", "[SEP]")

# SentencePiece writes a space as U+2581 and would read that character, where a text has it, as a space: it is encoded
# as its three bytes instead.
_SPACE_MARK = "\u2581"
# A long text is encoded in segments that end in a newline. With our newline piece, which nothing merges with, that is
# the encoding of the whole; memory and the cost of BPE stay linear.
_SEGMENT_CHARS = 4096
_LONGEST_SEGMENT_CHARS = 16 * _SEGMENT_CHARS
_SEGMENTS_AT_ONCE = 1024
_N_THREADS = os.cpu_count() or 1
_NO_IDS = np.zeros(0, dtype=np.int32)
_PROBE = " \t[MASK] <s>  two  spaces\n\n\r\n    caf\u00e9 cafe\u0301 \u6f22\u5b57 \U0001f642 \ufb01\u00a0\x00 "


class Tokenizer:
    """A SentencePiece model; attributes `vocab_size`, `pad_id`, `bos_id`, ... are its own."""

    def __init__(self, model: bytes, *, name: str = "the tokenizer") -> None:
        """Reads a serialised model.

        Raises:
          UserError: no model, a special piece is missing or can occur in text, or encoding loses something.
        """
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError, ValueError):
            raise UserError(f"{name} is not a SentencePiece model") from None
        if not model:
            raise UserError(f"{name} is not a SentencePiece model: it is empty")
        self.model = model
        self.digest = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.get_piece_size()
        self.pad_id: int = self._processor.pad_id()
        self.unk_id: int = self._processor.unk_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.mask_id, self.cls_id, self.sep_id = (self._control_id(piece) for piece in CONTROL_PIECES)
        named = {"pad": self.pad_id, "bos": self.bos_id, "eos": self.eos_id}
        named |= dict(zip(CONTROL_PIECES, (self.mask_id, self.cls_id, self.sep_id), strict=True))
        is_control = self._processor.is_control
        missing = ", ".join(name for name, piece in named.items() if piece < 0 or not is_control(piece))
        if missing:
            raise UserError(f"{name} lacks {missing} as control pieces; leave data.tokenizer empty to train one")
        self.special_ids = (*named.values(), self.unk_id)
        self._mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        probe = self.encode(_PROBE)
        if self.decode(probe) != _PROBE or self.piece_bytes[probe].sum() != len(_PROBE.encode()):
            raise UserError(
                f"{name} does not encode text exactly; it needs byte_fallback, "
                "normalization_rule_name=identity, add_dummy_prefix=false and remove_extra_whitespaces=false; "
                "leave data.tokenizer empty to train one"
            )

    def _control_id(self, piece: str) -> int:
        """The id of a piece that no text can produce; -1 when there is none."""
        piece_id = self._processor.piece_to_id(piece)
        return piece_id if self._processor.is_control(piece_id) else -1

    def encode(self, text: str) -> Int32[np.ndarray, "T"]:
        """Ids of a text, special ones never among them."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[Int32[np.ndarray, "_"]]:
        """Ids of each text, encoded by all cores."""
        segments = [list(_segments(text)) for text in texts]
        encoded = self._encoded([segment for group in segments for segment in group])
        return [np.concatenate([_NO_IDS, *itertools.islice(encoded, len(group))]) for group in segments]

    def _encoded(self, segments: list[str]) -> Iterator[Int32[np.ndarray, "_"]]:
        """Ids of each segment; the lists of Python integers that SentencePiece returns exist for a group at a time."""
        for group in itertools.batched(segments, _SEGMENTS_AT_ONCE):
            for segment, ids in zip(group, self._processor.encode(list(group), num_threads=_N_THREADS), strict=True):
                yield np.array(self._mark_ids if segment == _SPACE_MARK else ids, dtype=np.int32)

    def decode(self, ids: Iterable[int | np.integer] | Int[np.ndarray, "_"]) -> str:
        """Text of ids; special ids and ids beyond the vocabulary (a model may have more) stand for nothing."""
        special = frozenset(self.special_ids)
        kept = [i for i in map(int, ids) if 0 <= i < self.vocab_size and i not in special]
        return self._processor.decode(kept) if kept else ""

    def piece(self, number: int) -> str:
        """A piece as the model spells it."""
        return self._processor.id_to_piece(number)

    def score(self, number: int) -> float:
        """What the model ranks a piece by; of pieces that two neighbours may be joined to, the highest is."""
        return self._processor.get_score(number)

    def scored_bytes(self, targets: Int[np.ndarray, "*m"], weights: Float[np.ndarray, "*m"]) -> int:
        """UTF-8 bytes of the text that a loss asks for: of the targets whose weight is not 0."""
        return int(self.piece_bytes[targets[weights > 0]].sum())

    @cached_property
    def piece_bytes(self) -> Int32[np.ndarray, "V"]:
        """UTF-8 bytes of text that each piece stands for; 0 for the special ones."""
        counts = np.zeros(self.vocab_size, dtype=np.int32)
        for i in range(self.vocab_size):
            if self._processor.is_byte(i):
                counts[i] = 1
            elif not (self._processor.is_control(i) or self._processor.is_unknown(i)):
                counts[i] = len(self._processor.id_to_piece(i).replace(_SPACE_MARK, " ").encode())
        return counts


def open_tokenizer(model: bytes, *, name: str = "the tokenizer") -> Tokenizer:
    """A tokenizer out of the bytes of a SentencePiece model or of a `tokenizer.json`; UserError when it is unfit."""
    if model.lstrip()[:1] == b"{":
        from stackwise_jax.data.json_tokenizer import JsonTokenizer

        return JsonTokenizer(model, name=name)
    return Tokenizer(model, name=name)


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokenizer's file; UserError when it is missing, damaged or unfit (see `open_tokenizer`)."""
    try:
        model = path.read_bytes()
    except OSError as error:
        raise UserError(f"data.tokenizer={str(path)!r} cannot be read: {error.strerror or error}") from None
    return open_tokenizer(model, name=f"data.tokenizer={str(path)!r}")


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> bytes:
    """Trains a BPE model of exactly `vocab_size` pieces on the first `TRAINING_BYTES` of the documents.

    Pieces never span a newline or mix digits; runs of spaces up to 16 long may be one piece, which halves the length of
    indented text. The same documents give the same bytes.

    Returns:
      the serialised model: pad, unk, bos, eos are 0 to 3, [MASK], [CLS], [SEP] 4 to 6, newline 7, then 256 bytes.

    Raises:
      UserError: no text, or a vocabulary smaller or larger than the text allows.
    """
    lines = list(_training_lines(documents))  # a list, since errors raised inside the trainer's iterator would be lost
    if not lines:
        raise UserError("there is no text to train a tokenizer on; give more documents in data.source")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            required_chars=_SPACE_MARK,  # a text without spaces would else leave " " to be spelt as that mark's bytes
            max_sentence_length=4 * _SEGMENT_CHARS,  # bytes; longer lines would be left out
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            control_symbols=list(CONTROL_PIECES),
            user_defined_symbols=["\n"],
            num_threads=2,  # fixed, because the model records it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explained(error, vocab_size) from None
    return model.getvalue()


def _explained(error: RuntimeError, vocab_size: int) -> Exception:
    """What a person can do about a failed training; the error itself when that is nothing."""
    if most := re.search(r"set it to a value <= (\d+)", str(error)):
        return UserError(f"model.vocab_size={vocab_size} is more than this corpus allows; set it to at most {most[1]}")
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        return UserError(
            f"model.vocab_size={vocab_size} is less than the special pieces, bytes and letters of this corpus need; "
            f"set it to at least {least[1]}"
        )
    return error


def _training_lines(documents: Iterable[str]) -> Iterator[str]:
    """Lines without their ends, none longer than a segment, up to TRAINING_BYTES in all; U+0000 ends a piece too."""
    left = TRAINING_BYTES
    for document in documents:
        for line in re.split(r"[\n\0]", document[:left]):
            for start in range(0, len(line), _SEGMENT_CHARS):
                part = line[start : start + _SEGMENT_CHARS]
                left -= len(part.encode())
                yield part
            if left <= 0:
                return


def _segments(text: str) -> Iterator[str]:
    """Cuts a text after newlines into parts that are encoded alone; a U+2581 is a part of its own."""
    for part in re.split(f"({_SPACE_MARK})", text):
        start = 0
        while start < len(part):
            hard_end = min(len(part), start + _LONGEST_SEGMENT_CHARS)
            end = part.find("\n", start + _SEGMENT_CHARS, hard_end) + 1 or hard_end
            yield part[start:end]
            start = end
