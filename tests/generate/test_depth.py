"""Depth as time: which stacks run at which masked share, for every form, and where infilling begins."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.errors import UserError
from stackwise_jax.generate.denoise import RackDenoiser, pad_rows
from stackwise_jax.generate.depth import FORMS, denoise_by_depth, depth_of, make_band_denoisers
from stackwise_jax.generate.reveal import Rule, row_keys
from stackwise_jax.models.rack import init_rack
from stackwise_jax.models.stack import stack_size
from stackwise_jax.train.curriculum import make_curriculum
from stackwise_jax.train.phases import stack_sizes
from stackwise_jax.train.state import Frozen
from stackwise_jax.train.trained import settled_rack
from tests.generate.reading import ALLOWED, MASK, MODEL, PAD, VOCAB, Told, check_filled, rack_of

BANDS = ((0.7, 1.0), (0.3, 0.7), (0.0, 0.3))
LEVELS = ((0.9, 0.9), (0.5, 0.5), (0.15, 0.15))
TABLE = jnp.array(np.random.default_rng(0).normal(0, 2, (16, VOCAB)), jnp.float32)
WARM = Rule(mask_id=MASK, temperature=1.0)
Call = tuple[int, np.ndarray]
"""The band that was run, and the masked share of each row."""


def calls(canvas: np.ndarray, bands: tuple, *, order: list[int] | None = None, steps: int | None = None) -> list[Call]:
    """Every call of a band's denoiser; `order` puts the denoisers at wrong bands."""
    seen: list[Call] = []

    def told(band: int) -> Told:
        return Told(TABLE, lambda _, rate: seen.append((band, np.array(rate))))

    denoisers = [told(band) for band in order or range(len(bands))]
    keys = row_keys(jax.random.key(0), len(canvas))
    filled, passes = denoise_by_depth(denoisers, bands, canvas, keys=keys, allowed=ALLOWED, rule=WARM, steps=steps)
    jax.effects_barrier()
    check_filled(canvas, filled)
    assert passes == len(seen)
    return seen


def check_bands(seen: list[Call], bands: tuple) -> None:
    """Rows that are under way are in the band that runs: above the next band's edge, at most at its own."""
    edges = [*(high for _, high in bands), 0.0]
    for band, rates in seen:
        assert rates.max() <= max(edges[band], rates[0]) + 1e-6
        assert (rates > edges[band + 1]).any()
        assert (rates <= edges[band] + 1e-6).all() or band == 0


ALL_MASKS = np.full((2, 10), MASK, np.int32)


@pytest.mark.parametrize("bands", [BANDS, LEVELS])
@pytest.mark.parametrize("steps", [None, 3, 7])
def test_each_band_runs_at_its_own_share(bands: tuple, steps: int | None):
    seen = calls(ALL_MASKS, bands, steps=steps)
    check_bands(seen, bands)
    assert [band for band, _ in seen] == sorted(band for band, _ in seen)
    assert {band for band, _ in seen} == {0, 1, 2}
    one_less = bands is LEVELS  # one place is left for the two passes of the last level
    assert len(seen) == {None: 10, 3: 3, 7: 7 - one_less}[steps]


def test_the_law_of_bands_detects_denoisers_at_wrong_bands():
    with pytest.raises(AssertionError):
        check_bands(calls(ALL_MASKS, BANDS, order=[2, 1, 0]), BANDS)


def test_the_heaviest_noise_goes_first_wherever_its_stacks_lie():
    assert [band for band, _ in calls(ALL_MASKS, BANDS[::-1], steps=3)] == [2, 1, 0]


def test_infilling_begins_at_the_band_that_holds_the_share():
    few = np.array([[1, 2, MASK, 3, 4, 5, MASK, 6, 7, 8]], np.int32)  # a share of 0.2
    assert {band for band, _ in calls(few, BANDS)} == {2}
    half = np.array([[MASK, MASK, MASK, MASK, MASK, 5, 4, 6, 7, 8]], np.int32)
    assert [band for band, _ in calls(half, BANDS)] == [1, 1, 2, 2, 2]
    assert {band for band, _ in calls(np.concatenate([few, half]), BANDS)} == {1, 2}


def test_a_row_is_the_same_alone():
    rows = [np.array([1, *[MASK] * 8]), np.array([1, 3, MASK, 4, MASK, MASK])]
    canvas, keys = pad_rows(rows, PAD), row_keys(jax.random.key(5), 2)
    denoisers = make_band_denoisers(
        rack_of(MODEL), MODEL, [(0,), (1,), (2,)], form="suffix", mask_id=MASK, pad_id=PAD, dtype=jnp.float32
    )
    options = {"allowed": ALLOWED, "rule": WARM}
    together, _ = denoise_by_depth(denoisers, BANDS, canvas, keys=keys, **options)
    check_filled(canvas, together)
    alone, _ = denoise_by_depth(denoisers, BANDS, canvas[1:, :6], keys=keys[1:], **options)
    np.testing.assert_array_equal(together[1, :6], alone[0])


@pytest.mark.parametrize(
    ("form", "ran"),
    [
        ("independent", [[0], [1, 2]]),
        ("suffix", [[0, 1, 2], [1, 2]]),
        ("prefix", [[0], [0, 1, 2]]),
        ("step_local", [[0], [1, 2]]),
    ],
)
def test_forms_run_the_stacks_of_the_table(form: str, ran: list[list[int]]):
    rack = rack_of(MODEL)
    heads = [{"tap": 0}, {"tap": 1}]
    made = make_band_denoisers(
        rack, MODEL, [(0,), (1, 2)], form=form, mask_id=MASK, pad_id=PAD, dtype=jnp.float32, heads=heads
    )
    for band, (denoiser, stacks) in enumerate(zip(made, ran, strict=True)):
        assert [id(stack) for stack in denoiser.rack["stacks"]] == [id(rack["stacks"][i]) for i in stacks]
        assert denoiser.rack["head"] == {"tap": band}
        assert denoiser.rescales_mask == (form == "step_local")


def test_step_local_masks_have_the_root_mean_square_of_the_embedding():
    rack, tokens, rate = rack_of(MODEL), jnp.array([[1, MASK, 4, MASK, 7]]), jnp.ones(1)
    local = RackDenoiser(rack, MODEL, MASK, PAD, jnp.float32, rescales_mask=True)(tokens, rate)
    table = np.asarray(rack["embedding"]["tokens"])
    scaled = table.copy()
    scaled[MASK] *= np.sqrt(np.mean(table**2)) / np.sqrt(np.mean(table[MASK] ** 2))
    by_hand = RackDenoiser({**rack, "embedding": {"tokens": jnp.array(scaled)}}, MODEL, MASK, PAD, jnp.float32)
    # Only the input is compared: a tied head would read the scaled table too, and this one is not tied.
    np.testing.assert_allclose(local, by_hand(tokens, rate), rtol=2e-5, atol=2e-5)
    plain = RackDenoiser(rack, MODEL, MASK, PAD, jnp.float32)(tokens, rate)
    assert np.abs(np.asarray(local - plain)).max() > 1e-3


RUN = {"objective__name": "diffusion", "objective__time": "depth", "model__attention": "bidirectional"}
UNCACHED = {"training__progressive__cache_activations": False}
EDGES = (1.0, 0.667, 0.334, 0.001)


@pytest.mark.parametrize(
    ("direction", "overrides", "form", "tapped"),
    [
        ("right_to_left", {}, "suffix", (False, True, True)),
        ("left_to_right", UNCACHED, "prefix", (True, True, False)),
        ("independent", {}, "independent", (False, False, False)),
    ],
)
def test_a_run_says_how_its_bands_are_read(direction: str, overrides: dict, form: str, tapped: tuple, tiny: Any):
    """Five stacks in three bands: which stacks a band has, which head its phase left, and where its edges are."""
    make = functools.partial(
        tiny,
        **RUN,
        **overrides,
        model__architecture__n_stacks=5,
        objective__n_bands=3,
        training__progressive__direction=direction,
    )
    config, rack = make(), {"stacks": [{"scale": np.ones((1, 4))}] * 5}
    # The loop writes a head after every phase that trains stacks, but for the last one, whose head is the rack's.
    taps = {
        phase.main.live_stacks[-1]: {"after": phase.name} for phase in make_curriculum(config)[:-1] if phase.live_stacks
    }
    depth = depth_of(config, rack, taps.get)
    assert depth is not None
    assert depth.form == form
    assert [stack for own in depth.stacks for stack in own] == [0, 1, 2, 3, 4]
    assert sorted(map(len, depth.stacks)) == [1, 2, 2]
    assert depth.heads == tuple(
        {"after": f"band_{band:04d}"} if is_tapped else None for band, is_tapped in enumerate(tapped)
    )
    np.testing.assert_allclose(depth.bands, list(zip(EDGES[1:], EDGES[:-1], strict=True)), rtol=1e-6)
    turned = depth_of(make(objective__noise_order="low_to_high"), rack, taps.get)
    assert turned is not None
    assert turned.bands == depth.bands[::-1]
    for other in FORMS:
        if other == form or (form, other) == ("suffix", "step_local"):
            read = depth_of(config, rack, taps.get, form=other)
            assert read is not None
            assert read.form == other
        else:
            with pytest.raises(UserError, match=f"--form={other}: .*can be run as: {form}"):
                depth_of(config, rack, taps.get, form=other)
    with pytest.raises(UserError, match=r"4 of 5 stacks are there.*--stacks"):
        depth_of(config, {"stacks": rack["stacks"][:4]}, taps.get)


def test_bands_of_merged_stacks_are_read_as_of_stacks_apart(tiny: Any):
    """Stacks of one band become one, of two bands never; a rack in which they did is refused."""
    config = tiny(**RUN, objective__n_bands=2)
    apart = init_rack(jax.random.key(0), config.model, stack_sizes(config))
    frozen = Frozen(embedding=apart["embedding"], head=apart["head"])
    frozen.stacks.update(enumerate(apart["stacks"]))
    merged = settled_rack(config, frozen)
    assert [stack_size(stack) for stack in merged["stacks"]] == [2, 1]
    tokens = jnp.array([[1, MASK, 4, MASK, 7]])
    logits = []
    for rack, stacks in ((merged, ((0,), (1,))), (apart, ((0, 1), (2,)))):
        depth = depth_of(config, rack, {}.get)
        assert depth is not None
        assert depth.stacks == stacks
        made = make_band_denoisers(
            rack, config.model, depth.stacks, form="independent", mask_id=MASK, pad_id=PAD, dtype=jnp.float32
        )
        logits.append([np.asarray(denoiser(tokens, jnp.ones(1))) for denoiser in made])
    for one, other in zip(*logits, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)
    assert not np.allclose(logits[0][0], logits[1][1], rtol=2e-5, atol=2e-5)
    whole = {**apart, "stacks": [jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *apart["stacks"])]}
    with pytest.raises(ValueError, match="blocks of two bands"):
        depth_of(config, whole, {}.get)


def test_a_run_whose_time_is_not_depth_has_none(tiny: Any):
    assert depth_of(tiny(), {"stacks": []}, {}.get) is None
    with pytest.raises(UserError, match=r"--form=suffix is for runs whose time is depth.*objective\.time='none'"):
        depth_of(tiny(), {"stacks": []}, {}.get, form="suffix")


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"form='sufix'.*Did you mean \"suffix\""):
        make_band_denoisers({}, MODEL, [], form="sufix", mask_id=MASK, pad_id=PAD, dtype=jnp.float32)
    with pytest.raises(UserError, match="steps=2 is too few for 3 bands"):
        calls(ALL_MASKS, BANDS, steps=2)
