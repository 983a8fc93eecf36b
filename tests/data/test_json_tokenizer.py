"""Tokenizers of the `tokenizers` package: what is exact is held to it, and what is not says so."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from stackwise_jax.data.json_tokenizer import JsonTokenizer
from stackwise_jax.data.tokenizer import load_tokenizer, open_tokenizer
from stackwise_jax.errors import UserError

TEXT = ["the cat sat on the mat\n", "  and the dog, sat on the log.  ", "caf\u00e9 12345 def f(x):\n\treturn x\n"] * 4


def byte_level() -> Any:
    """As GPT-2's: bytes as characters, one special token."""
    own = tokenizers.Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    own.train_from_iterator(TEXT, trainer)
    return own


def wordpiece() -> Any:
    """As BERT's: lower case, words apart by one space."""
    own = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    own.normalizer, own.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    own.decoder = decoders.WordPiece(cleanup=False)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    own.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    )
    return own


def byte_fallback() -> Any:
    """As LLaMA 2's: a mark for spaces, one before the text, bytes for what has no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581abcdefghijklmnopqrstuvwxyz"]
    pieces += ["\u2581t", "he", "\u2581the"]
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    own = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    own.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    own.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    own.add_special_tokens(["<unk>", "<s>", "</s>"])
    return own


def read(own: Any) -> JsonTokenizer:
    return JsonTokenizer(own.to_str().encode())


BYTE_LEVEL, WORDPIECE, FALLBACK = read(byte_level()), read(wordpiece()), read(byte_fallback())


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_byte_level_is_exact(text: str):
    ids = BYTE_LEVEL.encode(text)
    assert BYTE_LEVEL.decode(ids) == text
    assert int(BYTE_LEVEL.piece_bytes[ids].sum()) == len(text.encode())


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40).filter(lambda text: "\u2581" not in text))
def test_byte_fallback_counts_one_byte_more(text: str):
    ids = FALLBACK.encode(text)
    assert FALLBACK.decode(ids) == text
    if text:
        assert int(FALLBACK.piece_bytes[ids].sum()) == len(text.encode()) + 1


def test_wordpiece_counts_the_text_that_it_reads_back():
    ids = WORDPIECE.encode("The  CAT sat on caf\u00e9.")
    back = WORDPIECE.decode(ids)
    assert back == "the cat sat on cafe ."
    assert int(WORDPIECE.piece_bytes[ids].sum()) == len(back.encode()) + 1


def test_exactness_is_said():
    assert (BYTE_LEVEL.is_exact, WORDPIECE.is_exact, FALLBACK.is_exact) == (True, False, False)
    for normaliser in (normalizers.NFC(), normalizers.NFKC(), normalizers.Strip()):
        own = byte_level()
        own.normalizer = normaliser
        assert not read(own).is_exact


def test_special_tokens_are_never_read_out_of_a_text():
    for own, word in ((BYTE_LEVEL, "<|endoftext|>"), (WORDPIECE, "[MASK]"), (FALLBACK, "</s>")):
        ids = own.encode(f"the {word} the")
        assert not set(ids.tolist()) & set(own.special_ids) - {own.unk_id}
        assert own.encode("the").size
        assert own.decode([own.eos_id, *own.encode("the")]) == own.decode(own.encode("the"))


def test_roles():
    assert (WORDPIECE.pad_id, WORDPIECE.bos_id, WORDPIECE.eos_id, WORDPIECE.mask_id) == (0, 2, 3, 4)
    assert (FALLBACK.bos_id, FALLBACK.eos_id, FALLBACK.unk_id) == (1, 2, 0)
    assert BYTE_LEVEL.bos_id == BYTE_LEVEL.eos_id == 0
    for own in (BYTE_LEVEL, FALLBACK):  # roles that the file lacks are played by pieces that no text has
        assert len({own.pad_id, own.mask_id, own.bos_id}) == 3
        every_byte = bytes(range(256)).decode("latin-1") + "\u07ff\uffff\U0010ffff"
        assert not {own.pad_id, own.mask_id} & set(own.encode(every_byte).tolist())
        assert own.piece_bytes[own.pad_id] == 0
    assert BYTE_LEVEL.named == {"bos": 0, "eos": 0}


def test_a_file_is_known_by_what_it_holds(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text(byte_level().to_str())
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert isinstance(loaded, JsonTokenizer)
    np.testing.assert_array_equal(loaded.encode("the cat"), BYTE_LEVEL.encode("the cat"))
    assert loaded.digest == BYTE_LEVEL.digest


def without(own: Any, part: str, value: Any) -> bytes:
    return json.dumps({**json.loads(own.to_str()), part: value}).encode()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (b"{", "not a tokenizer.json"),
        (b"{}", "not a tokenizer.json"),
        (without(byte_level(), "added_tokens", []), "lacks special tokens"),
        (tokenizers.Tokenizer(models.Unigram([("a", 0.0)])).to_str().encode(), "not Unigram"),
        (tokenizers.Tokenizer(models.BPE({"a": 0}, [])).to_str().encode(), "byte-level BPE"),
    ],
)
def test_what_is_unfit_is_refused(model: bytes, words: str):
    with pytest.raises(UserError, match=words):
        open_tokenizer(model)
