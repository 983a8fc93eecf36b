"""A run that begins with the token table of another: the same numbers, frozen or trained; at other widths; refusals."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from stackwise_jax.data.corpus import Corpus
from stackwise_jax.errors import UserError
from stackwise_jax.models.rack import init_embedding
from stackwise_jax.train import loop
from stackwise_jax.train.curriculum import make_curriculum
from stackwise_jax.train.phases import Role
from stackwise_jax.train.sources import fitted_table, given_embedding
from stackwise_jax.train.trained import load_trained

SHORT = {"training__phase_budget": "2 steps", "training__embedding_budget": "2 steps", "evaluation__rows": 8}
SHORT |= {"model__architecture__n_stacks": 2, "checkpoint__keep": 1}


def table_of(folder: Path) -> np.ndarray:
    return np.asarray(load_trained(folder).rack["embedding"]["tokens"])


@pytest.fixture
def begun(tiny: Any, source: Path) -> Callable[..., Any]:
    """Configs that begin with it."""
    return lambda **fields: tiny(**{**SHORT, "training__embedding_from": str(source), **fields})


def test_a_given_table_is_never_trained_and_read_once(
    begun: Callable[..., Any], source: Path, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    """Its source may be gone when the run goes on: what was given lies in the run folder."""
    own = tmp_path / "source"
    shutil.copytree(source, own)
    config = begun(training__embedding_phase="given", training__embedding_from=str(own))
    loop.Run(config, tiny_corpus, tmp_path / "run", lambda _: None).folder.close()
    shutil.rmtree(own)
    result = loop.run(config, tiny_corpus, tmp_path / "run", say=lambda _: None)
    assert [phase.name for phase in result.plan.phases] == ["stack_0000", "stack_0001"]
    np.testing.assert_array_equal(table_of(tmp_path / "run"), table_of(source))


def test_a_table_that_is_trained_on_starts_from_the_given_one(
    begun: Callable[..., Any], source: Path, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    """A rate of next to nothing leaves it where it was; the twin, what the seed would have drawn, is elsewhere."""
    still = {"optimizer__learning_rate": 1e-12, "training__mode": "end_to_end"}
    config = begun(**still)
    loop.run(config, tiny_corpus, tmp_path / "run", say=lambda _: None)
    np.testing.assert_allclose(table_of(tmp_path / "run"), table_of(source), atol=1e-9)
    drawn = init_embedding(jax.random.key(config.seed), config.model)["tokens"]
    assert np.abs(np.asarray(drawn) - table_of(source)).max() > 1e-2


def test_no_phase_of_any_mode_trains_a_given_table(begun: Callable[..., Any]) -> None:
    full = {"training__mode": "progressive", "training__progressive__trunk_strategy": "full"}
    bands = {"objective__name": "diffusion", "model__attention": "bidirectional", "objective__time": "depth"}
    modes: list[dict[str, Any]] = [
        {},
        {"training__mode": "end_to_end"},
        full,
        {"training__progressive__direction": "right_to_left"},
        {**bands, "training__progressive__direction": "independent"},
        {"training__progressive__last_stacks": 1},
    ]
    for fields in modes:
        for phase, trained in (("given", False), ("with_first_stack", True)):
            curriculum = make_curriculum(begun(**fields, training__embedding_phase=phase))
            roles = {branch.embedding for own in curriculum for branch in own.branches}
            assert (Role.LIVE in roles) == trained, fields


def test_a_narrower_table_keeps_what_the_singular_values_say() -> None:
    """The squared error of the best map of rank D is the sum of the squared singular values beyond D."""
    draw = np.random.default_rng(0)
    table = (draw.normal(size=(50, 12)) * np.linspace(3.0, 0.2, 12)[None, :]).astype(np.float32)
    fitted, share = fitted_table(table, 5)
    squares = np.linalg.svd(table.astype(np.float64), compute_uv=False) ** 2
    assert fitted.shape == (50, 5)
    assert share == pytest.approx(squares[:5].sum() / squares.sum(), rel=1e-6)
    assert float((fitted**2).sum()) == pytest.approx(squares[:5].sum(), rel=1e-5)
    error = np.abs(fitted @ fitted.T - table @ table.T).max()
    np.testing.assert_allclose(np.linalg.norm(fitted @ fitted.T - table @ table.T), np.sqrt((squares[5:] ** 2).sum()))
    cut = table[:, 7:]  # the twin: columns left out instead of directions
    assert np.abs(cut @ cut.T - table @ table.T).max() > 2 * error


def test_a_wider_table_keeps_every_product(begun: Callable[..., Any], source: Path, tiny_corpus: Corpus) -> None:
    said: list[str] = []
    config = begun(model__d_model=48, training__embedding_phase="given")
    wide = given_embedding(config, tiny_corpus.tokenizer, said.append)["tokens"]
    own = table_of(source)
    assert wide.shape == (320, 48)
    np.testing.assert_allclose(wide @ wide.T, own @ own.T, rtol=1e-5, atol=1e-6)
    given_embedding(begun(model__d_model=16), tiny_corpus.tokenizer, said.append)
    assert said[0].endswith("a table of 320 x 32 on 48 columns")
    assert "on 16 columns, which hold" in said[1]


def test_what_cannot_be_given_is_refused_in_one_line(
    begun: Callable[..., Any], source: Path, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    def refusal(make: Callable[[], Any]) -> str:
        with pytest.raises(UserError) as caught:
            make()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    given = {"training__embedding_phase": "given"}
    assert "name a finished run" in refusal(lambda: begun(**given, training__embedding_from=""))
    assert "model.positions='learned' it has more" in refusal(lambda: begun(**given, model__positions="learned"))
    tied = {"training__head": "copy", "model__ties_embedding": True}
    assert "set model.ties_embedding=False" in refusal(lambda: begun(**given, **tied))
    fusion = {"training__mode": "fusion", "training__fusion__sources": "runs/a"}
    assert "embedding of its first source" in refusal(lambda: begun(**fusion))

    def read(**fields: Any) -> str:
        return refusal(lambda: given_embedding(begun(**fields), tiny_corpus.tokenizer, lambda _: None))

    assert "set model.vocab_size=320" in read(model__vocab_size=400)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("{}")
    (tmp_path / "theirs" / "model.safetensors").touch()
    assert "stackwise_jax.convert --from=" in read(training__embedding_from=str(tmp_path / "theirs"))
    assert "is not a run folder" in read(training__embedding_from=str(tmp_path))
