"""Generation is the rack read again from the start for every token; rows of a batch do not see each other."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.errors import UserError
from stackwise_jax.generate.autoregressive import generate, generate_rows, read_prompts, read_token
from stackwise_jax.generate.texts import printable
from stackwise_jax.models.rack import apply_rack, init_rack, output_table, row_context
from stackwise_jax.schema import ArchitectureConfig, KernelConfig, LatentConfig, ModelConfig
from stackwise_jax.types import Params

VOCAB = 23
PLAIN = ModelConfig(
    vocab_size=VOCAB,
    d_model=16,
    n_heads=4,
    n_kv_heads=4,
    d_head=4,
    d_ff=24,
    max_positions=16,
    init_std=0.3,
    architecture=ArchitectureConfig(n_stacks=2, blocks_per_stack=1),
)
MODELS = {
    "multi-head": PLAIN,
    "grouped queries": dataclasses.replace(PLAIN, n_kv_heads=2, ties_embedding=True),
    "learned positions": dataclasses.replace(PLAIN, positions="learned", norm="layernorm", use_bias=True, ffn="gelu"),
    "post-norm": dataclasses.replace(PLAIN, norm_position="post", embedding_norm=True, n_kv_heads=1),
}
LATENTS = LatentConfig(kv_rank=24, query_rank=3, d_rope=2, d_value=4)
KERNEL = KernelConfig(family="laplacian", form="linear", n_features=8, positive_features=6, scale=2.0)
KINDS = {
    "latents": dataclasses.replace(PLAIN, attention_kind="mla", latent=LATENTS),
    "sums": dataclasses.replace(PLAIN, attention_kind="mlgka", latent=LATENTS, kernel=KERNEL, n_kv_heads=2),
}
PROMPTS = [np.array(ids) for ids in ([3, 5, 7, 11, 2], [1], [4, 4, 9])]


@functools.cache
def rack_of(model: ModelConfig) -> Params:
    return jax.jit(init_rack, static_argnums=(1, 2))(jax.random.key(7), model, (1, 1))


def continued(model: ModelConfig, prompts: list[np.ndarray], **options: Any) -> list[list[int]]:
    settings: dict[str, Any] = {
        "tokens": 8,
        "key": jax.random.key(1),
        "allowed": np.ones(VOCAB, bool),
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "eos_id": None,
        "dtype": jnp.float32,
    }
    return [row.tolist() for row in generate(rack_of(model), model, prompts, **(settings | options))]


LONGEST = 16


@functools.partial(jax.jit, static_argnums=1)
def row_logits(rack: Params, model: ModelConfig, row: jax.Array) -> jax.Array:
    context = row_context(model, jnp.ones_like(row), jnp.arange(LONGEST)[None, :])
    hidden = apply_rack(rack, row, context, model, dtype=jnp.float32)
    return hidden[0] @ output_table(rack["head"], rack["embedding"]).T


def full_logits(model: ModelConfig, ids: np.ndarray) -> np.ndarray:
    """Logits after `ids`, all of them read at once; what fills the row up lies in their future."""
    row = np.pad(ids, (0, LONGEST - len(ids)))[None, :]
    return np.asarray(row_logits(rack_of(model), model, jnp.array(row)))[len(ids) - 1]


jitted_prompts = jax.jit(read_prompts, static_argnums=3, static_argnames=("slots", "dtype"))
jitted_token = jax.jit(read_token, static_argnums=5, static_argnames="dtype")


def decoded_logits(model: ModelConfig, fault: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Logits after a left-padded prompt and after each of three more tokens: decoded, and recomputed from the start."""
    rack, prompt, more = rack_of(model), np.array([3, 5, 7]), [8, 1, 13]
    padded, first = jnp.array([[0, 0, *prompt]]), jnp.array([2])
    logits, stored = jitted_prompts(rack, padded, first, model, slots=8, dtype=jnp.float32)
    decoded, recomputed = [np.asarray(logits[0])], [full_logits(model, prompt)]
    for i, token in enumerate(more):
        # A fault in `first` here moves positions and shows padding; the prompt was read rightly.
        logits, stored = jitted_token(
            rack, jnp.array([token]), jnp.array(5 + i), first - fault, stored, model, dtype=jnp.float32
        )
        decoded.append(np.asarray(logits[0]))
        recomputed.append(full_logits(model, np.array([*prompt, *more[: i + 1]])))
    return decoded, recomputed


@pytest.mark.parametrize("name", [*MODELS, *KINDS])
def test_decoding_is_recomputation(name: str):
    # Sums are of exponentials, whose rounding errors they keep: 7e-5 on some processors, where others give 1e-5.
    limit = 1e-4 if name == "sums" else 2e-5
    for ours, expected in zip(*decoded_logits((MODELS | KINDS)[name]), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=limit, atol=limit)  # logits of order 1 to 10


@pytest.mark.parametrize("name", ["multi-head", "learned positions", "latents", "sums"])
def test_decoding_is_recomputation_detects_wrong_positions(name: str):
    decoded, recomputed = decoded_logits((MODELS | KINDS)[name], fault=1)
    assert max(np.abs(a - b).max() for a, b in zip(decoded[1:], recomputed[1:], strict=True)) > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_the_argmax_of_recomputed_logits(name: str):
    model = MODELS[name]
    for row, prompt in zip(continued(model, PROMPTS, tokens=5), PROMPTS, strict=True):
        ids = prompt
        for _ in range(5):
            ids = np.append(ids, np.argmax(full_logits(model, ids)))
        assert row == ids.tolist()


@pytest.mark.parametrize("name", [*MODELS, "sums"])
def test_a_row_is_the_same_alone(name: str):
    model = (MODELS | KINDS)[name]
    together = continued(model, PROMPTS)
    alone = [continued(model, [prompt])[0] for prompt in PROMPTS]
    assert together == alone
    assert len({tuple(row[-4:]) for row in together}) > 1  # otherwise rows that mix up would go unnoticed


def test_prompts_are_kept_and_lengths_are_what_was_asked():
    for row, prompt in zip(continued(PLAIN, PROMPTS, temperature=1.0), PROMPTS, strict=True):
        assert row[: len(prompt)] == prompt.tolist()
        assert len(row) == len(prompt) + 8


def test_temperature_zero_ignores_the_key_and_others_do_not():
    keys = [jax.random.key(seed) for seed in (1, 2)]
    assert continued(PLAIN, PROMPTS, key=keys[0]) == continued(PLAIN, PROMPTS, key=keys[1])
    warm = [continued(PLAIN, PROMPTS, key=key, temperature=1.0) for key in (*keys, keys[0])]
    assert warm[0] == warm[2]
    assert warm[0] != warm[1]


def test_top_k_of_one_is_greedy():
    assert continued(PLAIN, PROMPTS, temperature=1.0, top_k=1) == continued(PLAIN, PROMPTS)


def test_forbidden_ids_do_not_occur():
    allowed = np.arange(VOCAB) % 3 == 0
    free = {i for row, p in zip(continued(PLAIN, PROMPTS), PROMPTS, strict=True) for i in row[len(p) :]}
    assert not all(allowed[i] for i in free)
    for temperature in (0.0, 2.0):
        rows = continued(PLAIN, PROMPTS, allowed=allowed, temperature=temperature)
        assert all(allowed[i] for row, p in zip(rows, PROMPTS, strict=True) for i in row[len(p) :])


def test_the_penalty_counts_what_the_row_said_and_no_padding():
    for penalty in (1.0, 1.4):
        rows = continued(PLAIN, PROMPTS, tokens=5, repetition_penalty=penalty)
        for row, prompt in zip(rows, PROMPTS, strict=True):
            ids = prompt
            for _ in range(5):
                logits = full_logits(PLAIN, ids)
                said = np.isin(np.arange(VOCAB), ids)
                lower = np.where(logits > 0, logits / penalty, logits * penalty)
                ids = np.append(ids, np.argmax(np.where(said, lower, logits)))
            assert row == ids.tolist()
    assert rows != continued(PLAIN, PROMPTS, tokens=5)


def test_eos_ends_its_row_and_no_other():
    free = continued(PLAIN, PROMPTS)
    eos = free[0][len(PROMPTS[0]) + 2]
    assert any(eos not in row[len(p) :] for row, p in zip(free, PROMPTS, strict=True))
    for row, whole, prompt in zip(continued(PLAIN, PROMPTS, eos_id=eos), free, PROMPTS, strict=True):
        new = whole[len(prompt) :]
        assert row == prompt.tolist() + (new[: new.index(eos) + 1] if eos in new else new)


def test_one_program_whatever_the_number_of_tokens():
    def program(tokens: int) -> str:
        arrays = (rack_of(PLAIN), jnp.zeros((1, 2), jnp.int32), jnp.zeros(1, jnp.int32), jax.random.key(0))
        options = (PLAIN, tokens, (0.0, 0, 1.0, 1.0), None, jnp.float32)
        return generate_rows.lower(*arrays, jnp.ones(VOCAB, bool), *options).as_text()

    assert program(12).count("\n") == program(3).count("\n")


def test_rotary_positions_may_go_beyond_training_and_learned_ones_may_not():
    assert len(continued(PLAIN, [np.arange(10)], tokens=10)[0]) == 20
    learned = MODELS["learned positions"]
    assert len(continued(learned, [np.arange(10)], tokens=6)[0]) == 16
    with pytest.raises(UserError, match=r"need 17 positions.*max_positions=16"):
        continued(learned, [np.arange(10)], tokens=7)


def test_bfloat16_and_a_rack_without_stacks_generate_too():
    assert all(len(row) > 8 for row in continued(PLAIN, PROMPTS, dtype=jnp.bfloat16))
    bare = {**rack_of(PLAIN), "stacks": []}
    options: dict[str, Any] = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "eos_id": None, "dtype": jnp.float32}
    allowed, key = np.ones(VOCAB, bool), jax.random.key(0)
    rows = generate(bare, PLAIN, PROMPTS, tokens=1, key=key, allowed=allowed, **options)
    table = np.asarray(bare["embedding"]["tokens"])
    normed = table / np.sqrt(np.mean(table**2, axis=1, keepdims=True) + PLAIN.norm_epsilon)
    likeliest = np.argmax(normed @ np.asarray(bare["head"]["table"]).T, axis=1)
    assert [row[-1] for row in rows] == [likeliest[prompt[-1]] for prompt in PROMPTS]


def test_what_cannot_be_continued_is_refused():
    with pytest.raises(UserError, match=r"bidirectional.*denoise"):
        continued(dataclasses.replace(PLAIN, attention="bidirectional"), PROMPTS)
    with pytest.raises(ValueError, match="bos"):
        continued(PLAIN, [np.array([], np.int32)])
    assert continued(PLAIN, []) == []


def test_printing_leaves_out_what_a_terminal_obeys():
    assert printable("a\tb\nc\x1b[2Jd\x00\x7f\x9be\r\u00e9\U0001f642") == "a\tb\nc[2Jde\u00e9\U0001f642"
