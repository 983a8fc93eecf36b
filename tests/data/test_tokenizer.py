"""The tokenizer: nothing is lost, every byte is counted once, special ids cannot be written."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax.data import tokenizer as tokenizer_module
from stackwise_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from stackwise_jax.errors import UserError

TEXTS = st.one_of(
    st.text(),
    st.lists(
        st.sampled_from(
            ["\u2581", "\0", "[MASK]", "<s>", "<unk>", "<0x41>", "\n", "\r\n", "\t", "    ", "caf\u00e9", "\u2047"]
        )
    ).map("".join),
)


def test_every_byte_is_counted_once_and_nothing_is_lost(tokenizer: Tokenizer) -> None:
    @settings(max_examples=300, deadline=None)
    @given(TEXTS)
    def law(text: str) -> None:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert tokenizer.piece_bytes[ids].sum() == len(text.encode())
        assert tokenizer.decode(ids) == text
        assert not np.isin(ids, tokenizer.special_ids).any()

    law()


def test_the_law_detects_an_unguarded_space_mark_and_counting_characters(tokenizer: Tokenizer) -> None:
    naive = tokenizer._processor.encode("x\u2581y")
    assert tokenizer.piece_bytes[naive].sum() != len("x\u2581y".encode())
    assert tokenizer._processor.decode(naive) != "x\u2581y"
    ids = tokenizer.encode("caf\u00e9")
    assert len(ids) < 5  # there is a piece with the accent, so characters and bytes of pieces differ
    assert sum(len(tokenizer._processor.id_to_piece(int(i))) for i in ids) != len("caf\u00e9".encode())


def test_special_ids_are_where_they_are_said_to_be(tokenizer: Tokenizer) -> None:
    named = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id)
    assert (*named, tokenizer.mask_id, tokenizer.cls_id, tokenizer.sep_id) == tuple(range(7))
    assert sorted(tokenizer.special_ids) == list(range(7))
    assert tokenizer.piece_bytes[:7].sum() == 0
    assert tokenizer.piece_bytes[7:].min() > 0
    assert tokenizer.vocab_size == 320 == len(tokenizer.piece_bytes)
    assert len(tokenizer.digest) == 64


def test_decode_skips_special_ids_and_those_beyond_the_vocabulary(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("return caf\u00e9")
    noisy = [tokenizer.bos_id, *ids, tokenizer.mask_id, tokenizer.vocab_size, 10**6, tokenizer.pad_id]
    assert tokenizer.decode(noisy) == "return caf\u00e9"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([tokenizer.eos_id]) == ""


def test_segments_change_nothing(tokenizer: Tokenizer, documents: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n\n".join(documents).replace("\u2581", "_")
    whole = tokenizer._processor.encode(text)
    monkeypatch.setattr(tokenizer_module, "_SEGMENT_CHARS", 50)
    monkeypatch.setattr(tokenizer_module, "_SEGMENTS_AT_ONCE", 7)
    assert tokenizer.encode(text).tolist() == whole
    monkeypatch.setattr(tokenizer_module, "_LONGEST_SEGMENT_CHARS", 7)  # cuts inside lines: seen, and still lossless
    assert tokenizer.encode(text).tolist() != whole
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_batch_is_its_texts_one_by_one(tokenizer: Tokenizer, documents: list[str]) -> None:
    texts = ["", *documents, "\u2581", ""]
    for ids, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert tokenizer.encode_batch([]) == []


def test_training_is_deterministic_and_depends_on_the_text(tokenizer: Tokenizer, documents: list[str]) -> None:
    assert train_tokenizer(iter(documents), 320) == tokenizer.model
    assert train_tokenizer(reversed(documents[:30]), 320) != tokenizer.model


def test_training_reads_a_bounded_sample(documents: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def endless():
        while True:
            yield from documents

    monkeypatch.setattr(tokenizer_module, "TRAINING_BYTES", 20_000)
    assert Tokenizer(train_tokenizer(endless(), 300)).vocab_size == 300


def test_indentation_and_long_lines_are_learnt(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("\n" + " " * 12 + "return")) <= 5
    line = "abcdefghij" * 5000
    assert len(Tokenizer(train_tokenizer([line], 285)).encode(line)) < len(line) / 5


def test_text_without_spaces_gives_a_tokenizer_that_knows_them() -> None:
    tokenizer = Tokenizer(train_tokenizer(["\u6f22\u5b57" * 50], 270))
    ids = tokenizer.encode("\u6f22 \u5b57")
    assert tokenizer.piece_bytes[ids].sum() == 7
    assert tokenizer.decode(ids) == "\u6f22 \u5b57"


def test_a_vocabulary_that_does_not_fit_names_one_that_does(documents: list[str]) -> None:
    with pytest.raises(UserError, match=r"^model\.vocab_size=50000 is more than .* at most (\d+)$") as most:
        train_tokenizer(documents, 50_000)
    largest = int(str(most.value).split()[-1])
    assert Tokenizer(train_tokenizer(documents, largest)).vocab_size == largest
    with pytest.raises(UserError, match=f"at most {largest}$"):
        train_tokenizer(documents, largest + 1)
    with pytest.raises(UserError, match=r"^model\.vocab_size=16 is less than .* at least (\d+)$") as least:
        train_tokenizer(documents, 16)
    smallest = int(str(least.value).split()[-1])
    assert Tokenizer(train_tokenizer(documents, smallest)).vocab_size == smallest
    with pytest.raises(UserError, match="no text to train"):
        train_tokenizer([], 320)


def test_errors_of_the_source_pass_through_training() -> None:
    def broken():
        yield "text"
        raise UserError("line 7 is broken")

    with pytest.raises(UserError, match="line 7"):
        train_tokenizer(broken(), 300)


def other_model(documents: list[str], **changes: Any) -> bytes:
    """A model trained like ours but for `changes`."""
    lines = [line for document in documents for line in document.split("\n")]
    options: dict[str, Any] = {
        "vocab_size": 320, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "add_dummy_prefix": False, "pad_id": 0,
        "unk_id": 1, "bos_id": 2, "eos_id": 3,
        "control_symbols": ["[MASK]", "[CLS]", "[SEP]"], "user_defined_symbols": ["\n"], "minloglevel": 2,
    }  # fmt: skip
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(lines), model_writer=model, **(options | changes)
    )
    return model.getvalue()


def test_load_accepts_a_model_with_other_ids(tmp_path: Path, documents: list[str]) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(other_model(documents, pad_id=3, eos_id=0, control_symbols=["[SEP]", "[CLS]", "[MASK]"]))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.sep_id, tokenizer.mask_id) == (3, 0, 4, 6)
    assert tokenizer.decode([0, *tokenizer.encode(documents[0])]) == documents[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control_symbols": ["[CLS]", "[SEP]"]}, r"lacks \[MASK\] as control pieces"),
        ({"control_symbols": ["[CLS]", "[SEP]"], "user_defined_symbols": ["[MASK]"]}, r"lacks \[MASK\]"),
        ({"pad_id": -1, "unk_id": 0}, "lacks pad"),
        ({"user_defined_symbols": ["<s>"]}, "lacks bos as control pieces"),  # a text could begin a document
        ({"add_dummy_prefix": True}, "does not encode text exactly"),
        ({"remove_extra_whitespaces": True}, "does not encode text exactly"),
        ({"normalization_rule_name": "nmt_nfkc"}, "does not encode text exactly"),
        ({"byte_fallback": False, "vocab_size": 60}, "does not encode text exactly"),
    ],
)
def test_load_refuses_unfit_models(tmp_path: Path, documents: list[str], changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(other_model(documents, **changes))
    with pytest.raises(UserError, match=rf"^data\.tokenizer='.*tokenizer\.model' {message}"):
        load_tokenizer(path)


@pytest.mark.parametrize("content", [b"", b"junk", b"\x00" * 100, None])
def test_load_refuses_files_that_are_no_models(tmp_path: Path, tokenizer: Tokenizer, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer.model[: len(tokenizer.model) // 2] if content is None else content)
    with pytest.raises(UserError, match=r"is not a SentencePiece model|lacks|does not encode"):
        load_tokenizer(path)
    with pytest.raises(UserError, match=r"data\.tokenizer=.*missing.* cannot be read: No such file"):
        load_tokenizer(tmp_path / "missing")
