"""Masks against a rule written out place by place, and the law that no query is left without a key."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax.ops.mask import Mask, decoding_mask, within_window

LENGTH = 6
KINDS = ["causal", "bidirectional", "prefix", "block_causal", "block_diffusion"]


def sees(kind: str, segments: list[int], number: int, t: int, s: int) -> bool:
    """`number`: length of the prefix, or of a block."""
    if segments[t] != segments[s]:
        return False
    if kind == "bidirectional" or (kind == "prefix" and t < number and s < number):
        return True
    if kind == "block_causal":
        return s // number <= t // number
    if kind == "block_diffusion":
        half = LENGTH // 2
        block_t, block_s = t % half // number, s % half // number
        if s < half:  # a noised key
            return t < half and block_t == block_s
        return block_s < block_t if t < half else block_s <= block_t
    return s <= t


Drawn = tuple[str, list[int], int]
masks = st.tuples(
    st.sampled_from(KINDS), st.lists(st.integers(0, 3), min_size=LENGTH, max_size=LENGTH), st.integers(1, LENGTH)
)


def as_mask(kind: str, segments: list[int], number: int) -> Mask:
    prefixes = jnp.array([number]) if kind == "prefix" else None
    return Mask(kind, jnp.array([segments]), prefixes, number if kind.startswith("block") else None)


@settings(max_examples=60, deadline=None)
@given(masks)
def test_array_is_the_rule_written_out(drawn: Drawn):
    kind, segments, number = drawn
    expected = [[sees(kind, segments, number, t, s) for s in range(LENGTH)] for t in range(LENGTH)]
    np.testing.assert_array_equal(as_mask(*drawn).as_array(LENGTH)[0, 0], expected)


@settings(max_examples=60, deadline=None)
@given(masks)
def test_every_place_sees_itself(drawn: Drawn):
    array = as_mask(*drawn).as_array(LENGTH)[0, 0]
    assert bool(jnp.diagonal(array).all())


@settings(max_examples=60, deadline=None)
@given(masks)
def test_what_is_seen_by_what_is_seen_is_seen(drawn: Drawn):
    """So no number of blocks brings a place what its mask hides from it."""
    assert is_closed(np.asarray(as_mask(*drawn).as_array(LENGTH)[0, 0]))


def is_closed(visible: np.ndarray) -> bool:
    return not np.any((visible.astype(int) @ visible.astype(int) > 0) & ~visible)


def test_closed_masks_detects_noised_keys_that_clean_places_see():
    mask = np.array(Mask("block_diffusion", block_length=1).as_array(LENGTH)[0, 0])
    mask[3:, :3] = np.tri(3, dtype=bool)
    assert not is_closed(mask)


def test_blocks_of_one_place_are_causal_and_one_block_is_bidirectional():
    def array(*fields: Any) -> np.ndarray:
        return np.asarray(Mask(*fields).as_array(LENGTH)[0, 0])

    np.testing.assert_array_equal(array("block_causal", None, None, 1), array("causal"))
    np.testing.assert_array_equal(array("block_causal", None, None, LENGTH), array("bidirectional"))
    assert not np.array_equal(array("block_causal", None, None, 2), array("causal"))
    half = LENGTH // 2
    noised = array("block_diffusion", None, None, 1)[:half]
    np.testing.assert_array_equal(noised[:, :half], np.eye(half))  # itself, and no other noised place
    np.testing.assert_array_equal(noised[:, half:], np.tri(half, k=-1))  # the clean ones strictly before
    clean = array("block_diffusion", None, None, 2)[half:]
    np.testing.assert_array_equal(clean[:, :half], np.zeros((half, half)))
    np.testing.assert_array_equal(clean[:, half:], array("block_causal", None, None, 2)[:half, :half])


def test_every_place_sees_itself_detects_hidden_padding():
    segments = jnp.array([[1, 1, 0]])
    array = Mask("causal", segments).as_array(3) & (segments != 0)[:, None, None, :]
    assert not bool(array.any(axis=-1).all())


@pytest.mark.parametrize("kind", ["causal", "bidirectional", "block_causal", "block_diffusion"])
def test_a_mask_without_data_has_one_row_for_all(kind: str):
    one_document = jnp.ones((2, LENGTH), jnp.int32)
    block_length = 2 if kind.startswith("block") else None
    plain = Mask(kind, block_length=block_length)
    assert plain.as_array(LENGTH).shape == (1, 1, LENGTH, LENGTH)
    assert not plain.has_data
    expected = Mask(kind, one_document, block_length=block_length).as_array(LENGTH)
    assert expected.shape == (2, 1, LENGTH, LENGTH)
    np.testing.assert_array_equal(jnp.broadcast_to(plain.as_array(LENGTH), expected.shape), expected)


def test_mask_goes_through_jit_with_its_kind_static():
    segments = jnp.array([[1, 1, 2, 0]])
    as_array = jax.jit(lambda mask: mask.as_array(4))
    for kind, block_length in (("causal", None), ("bidirectional", None), ("block_causal", 2), ("block_causal", 3)):
        mask = Mask(kind, segments, block_length=block_length)
        np.testing.assert_array_equal(as_array(mask), mask.as_array(4))
    assert len(jax.tree.leaves(Mask("block_causal", segments, block_length=2))) == 1


def test_misfits_are_errors():
    with pytest.raises(ValueError, match="4 places wide, the rows 5"):
        Mask("causal", jnp.ones((1, 4), jnp.int32)).as_array(5)
    with pytest.raises(ValueError, match="prefix_lengths"):
        Mask("prefix").as_array(4)
    with pytest.raises(ValueError, match="prefix_lengths"):
        Mask("causal", None, jnp.array([2])).as_array(4)
    for kind, block_length in (("block_causal", None), ("block_diffusion", None), ("bidirectional", 2)):
        with pytest.raises(ValueError, match="block_length if and only if"):
            Mask(kind, block_length=block_length).as_array(4)
    with pytest.raises(ValueError, match="block_length=0 must be at least 1"):
        Mask("block_causal", block_length=0).as_array(4)
    with pytest.raises(ValueError, match="rows of 5 places are not two halves"):
        Mask("block_diffusion", block_length=2).as_array(5)
    unknown = Mask("causal")
    object.__setattr__(unknown, "kind", "windowed")  # past the annotation, which only tests check
    with pytest.raises(ValueError, match="kind='windowed' must be one of: causal, "):
        unknown.as_array(4)


def test_decoding_is_causal_from_the_first_token_on():
    first = jnp.array([0, 2, 5])
    slots = jnp.broadcast_to(jnp.arange(LENGTH), (3, LENGTH))
    segments = (slots >= first[:, None]).astype(jnp.int32)
    expected = Mask("causal", segments).as_array(LENGTH)
    np.testing.assert_array_equal(decoding_mask(slots, LENGTH, first), expected)
    np.testing.assert_array_equal(decoding_mask(slots[:, 3:5], LENGTH, first), expected[:, :, 3:5])
    np.testing.assert_array_equal(
        decoding_mask(slots, LENGTH), jnp.broadcast_to(Mask("causal").as_array(LENGTH), expected.shape)
    )


def test_decoding_detects_a_forgotten_first():
    slots = jnp.arange(LENGTH)[None]
    forgotten, right = decoding_mask(slots, LENGTH), decoding_mask(slots, LENGTH, jnp.array([2]))
    assert bool((forgotten != right).any())


@settings(max_examples=40, deadline=None)
@given(masks, st.integers(1, LENGTH))
def test_a_window_hides_what_is_far(drawn: tuple[str, list[int], int], window: int):
    kind, segments, prefix_length = drawn
    half = LENGTH // 2 if kind == "block_diffusion" else LENGTH  # a place of the text lies in both halves
    near = [[abs(t % half - s % half) <= window for s in range(LENGTH)] for t in range(LENGTH)]
    rule = [[sees(kind, segments, prefix_length, t, s) for s in range(LENGTH)] for t in range(LENGTH)]
    mask = within_window(as_mask(*drawn), window, 0)
    assert isinstance(mask, Mask)
    assert mask.has_data
    array = mask.as_array(LENGTH)[0, 0]
    np.testing.assert_array_equal(array, np.array(rule) & np.array(near))
    assert bool(jnp.diagonal(array).all())


def test_a_window_over_stored_keys_counts_from_the_queries_slots():
    places = jnp.array([[3, 4]])
    array = within_window(decoding_mask(places, LENGTH), 2, 3)
    np.testing.assert_array_equal(array[0, 0].astype(int), [[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0]])
    shifted = within_window(decoding_mask(places, LENGTH), 2, 2)
    assert not np.array_equal(array, shifted)
