"""Masks against a rule written out place by place, and the law that no query is left without a key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax.ops.mask import Mask, decoding_mask, within_window

LENGTH = 6


def sees(kind: str, segments: list[int], prefix_length: int, t: int, s: int) -> bool:
    if segments[t] != segments[s]:
        return False
    if kind == "bidirectional" or (kind == "prefix" and t < prefix_length and s < prefix_length):
        return True
    return s <= t


masks = st.tuples(
    st.sampled_from(["causal", "bidirectional", "prefix"]),
    st.lists(st.integers(0, 3), min_size=LENGTH, max_size=LENGTH),
    st.integers(0, LENGTH),
)


def as_mask(kind: str, segments: list[int], prefix_length: int) -> Mask:
    return Mask(kind, jnp.array([segments]), jnp.array([prefix_length]) if kind == "prefix" else None)


@settings(max_examples=40, deadline=None)
@given(masks)
def test_array_is_the_rule_written_out(drawn: tuple[str, list[int], int]):
    kind, segments, prefix_length = drawn
    expected = [[sees(kind, segments, prefix_length, t, s) for s in range(LENGTH)] for t in range(LENGTH)]
    np.testing.assert_array_equal(as_mask(*drawn).as_array(LENGTH)[0, 0], expected)


@settings(max_examples=40, deadline=None)
@given(masks)
def test_every_place_sees_itself(drawn: tuple[str, list[int], int]):
    array = as_mask(*drawn).as_array(LENGTH)[0, 0]
    assert bool(jnp.diagonal(array).all())


def test_every_place_sees_itself_detects_hidden_padding():
    segments = jnp.array([[1, 1, 0]])
    array = Mask("causal", segments).as_array(3) & (segments != 0)[:, None, None, :]
    assert not bool(array.any(axis=-1).all())


@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_a_mask_without_data_has_one_row_for_all(kind: str):
    one_document = jnp.ones((2, LENGTH), jnp.int32)
    plain = Mask(kind)
    assert plain.as_array(LENGTH).shape == (1, 1, LENGTH, LENGTH)
    assert not plain.has_data
    expected = Mask(kind, one_document).as_array(LENGTH)
    assert expected.shape == (2, 1, LENGTH, LENGTH)
    np.testing.assert_array_equal(jnp.broadcast_to(plain.as_array(LENGTH), expected.shape), expected)


def test_mask_goes_through_jit_with_its_kind_static():
    segments = jnp.array([[1, 1, 2, 0]])
    as_array = jax.jit(lambda mask: mask.as_array(4))
    for kind in ("causal", "bidirectional"):
        np.testing.assert_array_equal(as_array(Mask(kind, segments)), Mask(kind, segments).as_array(4))
    assert len(jax.tree.leaves(Mask("causal", segments))) == 1


def test_misfits_are_errors():
    with pytest.raises(ValueError, match="4 places wide, the rows 5"):
        Mask("causal", jnp.ones((1, 4), jnp.int32)).as_array(5)
    with pytest.raises(ValueError, match="prefix_lengths"):
        Mask("prefix").as_array(4)
    with pytest.raises(ValueError, match="prefix_lengths"):
        Mask("causal", None, jnp.array([2])).as_array(4)


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
    near = [[abs(t - s) <= window for s in range(LENGTH)] for t in range(LENGTH)]
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
