"""Config fields as text."""

import pytest

from stackwise_jax import config as config_lib
from stackwise_jax.errors import UserError
from stackwise_jax.overrides import apply_overrides


def test_values_take_the_type_of_their_field():
    entries = config_lib.default()
    apply_overrides(
        entries,
        [
            "model.d_model=64",
            "model.n_kv_heads=2",
            "model.dropout=0",
            "model.use_bias=TRUE",
            "data.isolate_documents=false",
            "data.source=a=b.txt",
            "data.max_rows=None",
            "training.progressive.cache_activations=True",
        ],
    )
    config = config_lib.resolve(entries)
    assert (config.model.d_model, config.model.n_kv_heads, config.model.dropout) == (64, 2, 0.0)
    assert (config.model.use_bias, config.data.isolate_documents) == (True, False)
    assert (config.data.source, config.data.max_rows) == ("a=b.txt", None)
    assert config.training.progressive.cache_activations is True


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training.remat", ["section.field=value"]),
        ("training.rema=dots", ["unknown config field training.rema", 'Did you mean "remat"']),
        ("model.d_model.x=1", ["unknown config field model.d_model.x"]),
        ("model=1", ["model"]),
        ("model.d_model=wide", ["model.d_model must be of type int", "'wide'"]),
        ("model.use_bias=1", ["model.use_bias must be of type bool"]),
        ("training.progressive.cache_activations=maybe", ["must be of type bool"]),
    ],
)
def test_a_mistake_is_one_line(text: str, words: list[str]):
    with pytest.raises(UserError) as caught:
        apply_overrides(config_lib.default(), [text])
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
