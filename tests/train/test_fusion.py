"""Stacks of finished runs become one rack: the same numbers, in other stacks, under another objective; and refusals."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.data.corpus import Corpus
from stackwise_jax.errors import UserError
from stackwise_jax.fuse import fused_config
from stackwise_jax.memory.precision import from_storage
from stackwise_jax.schema import ExpertsConfig, KernelConfig, RunConfig
from stackwise_jax.train import loop
from stackwise_jax.train.folder import newest_snapshot
from stackwise_jax.train.sources import assemble, parse_sources
from stackwise_jax.train.trained import load_trained
from stackwise_jax.types import Params, Quantised

SHORT = {"training__phase_budget": "2 steps", "training__embedding_budget": "2 steps", "evaluation__rows": 8}
SHORT |= {"model__architecture__n_stacks": 2, "checkpoint__keep": 1}
MASKED = {"objective__name": "mlm", "model__attention": "bidirectional"}
JOINT = {"training__fusion__budget": "2 steps"}


def finished(config: RunConfig, corpus: Corpus, folder: Path) -> loop.Result:
    return loop.run(config, corpus, folder, say=lambda _: None)


@pytest.fixture(scope="module")
def runs(tiny: Any, tiny_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Finished runs of two stacks: a causal one, and a masked one with its stacks in 4 bits."""
    folder = tmp_path_factory.mktemp("sources")
    finished(tiny(**SHORT), tiny_corpus, folder / "causal")
    finished(tiny(**SHORT, **MASKED, precision__trunk="nf4", seed=1), tiny_corpus, folder / "masked")
    return {name: folder / name for name in ("causal", "masked")}  # type: ignore[return-value]


def stored(folder: Path) -> Any:
    snapshot, _ = newest_snapshot(folder)
    assert snapshot is not None
    return snapshot.frozen


def assembled(config: RunConfig, corpus: Corpus) -> Params:
    rack: Params = {"stacks": []}
    for kind, name, tree in assemble(config, corpus.tokenizer, lambda _: None):
        if kind == "stacks":
            assert int(name) == len(rack["stacks"])
            rack["stacks"].append(tree)
        else:
            rack[kind] = tree
    return rack


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def differs(one: Any, other: Any) -> bool:
    return any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


def joined(stacks: list[Params]) -> Params:
    return jax.tree.map(lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves]), *stacks)


# --- the rack ---


def test_a_rack_of_one_run_is_that_run(runs: dict[str, Path], tiny_corpus: Corpus) -> None:
    config = fused_config([str(runs["causal"])], "all", "", [], name="fused")
    assert (config.training.mode, config.model.architecture.n_stacks) == ("fusion", 2)
    rack, source = assembled(config, tiny_corpus), stored(runs["causal"])
    assert_same(rack, source.rack(1.0))


def test_stacks_of_two_runs_follow_one_another(runs: dict[str, Path], tiny_corpus: Corpus) -> None:
    """A stretch of the one, a stack of the other out of 4 bits; the embedding of the first and the head of the last."""
    sources = [f"{runs['causal']}:0-1", f"{runs['masked']}:1"]
    config = fused_config(sources, "all", "", [], name="fused")
    assert config.model.architecture.n_stacks == 3
    rack, causal, masked = assembled(config, tiny_corpus), stored(runs["causal"]), stored(runs["masked"])
    assert_same(rack["stacks"][:2], [causal.stacks[0], causal.stacks[1]])
    assert_same(rack["stacks"][2], from_storage(masked.stacks[1], jnp.float32))
    assert_same((rack["embedding"], rack["head"]), (causal.embedding, masked.head))
    assert differs(rack["stacks"][2], from_storage(masked.stacks[0], jnp.float32))  # the twin: another stack, other run
    assert differs((rack["embedding"], rack["head"]), (masked.embedding, causal.head))


@pytest.mark.parametrize("source", ["causal", "masked"])
def test_blocks_are_cut_into_stacks_of_another_size(source: str, runs: dict[str, Path], tiny_corpus: Corpus) -> None:
    """Also where they are stored in 4 bits, which is then how they stay."""
    overrides = ["model.architecture.n_stacks=1", "model.architecture.blocks_per_stack=2"]
    rack = assembled(fused_config([str(runs[source])], "all", "", overrides, name="fused"), tiny_corpus)
    own = stored(runs[source])
    (stack,) = rack["stacks"]
    assert_same(stack, joined([own.stacks[0], own.stacks[1]]))
    assert differs(stack, joined([own.stacks[1], own.stacks[0]]))
    leaves = jax.tree.leaves(stack, is_leaf=lambda leaf: isinstance(leaf, Quantised))
    assert any(isinstance(leaf, Quantised) for leaf in leaves) == (source == "masked")


def test_blocks_become_what_their_new_place_says(tiny: Any, tiny_corpus: Corpus, tmp_path: Path) -> None:
    """Which blocks have a window, and which is the first, is of the assembled rack; all other numbers are the run's."""
    unlike = {"window": 4, "global_every": 2, "first_attention_norm": False, "embedding_norm": True}
    fields = {f"model__{name}": value for name, value in unlike.items()}
    finished(tiny(**SHORT, **fields), tiny_corpus, tmp_path / "run")
    source = str(tmp_path / "run")
    rack = assembled(fused_config([f"{source}:1", source], "all", "", [], name="fused"), tiny_corpus)
    own = stored(tmp_path / "run").stacks
    moved = [own[1], own[0], own[1]]
    for fact, here, there in (("is_local", [0, 1, 0], [1, 0, 1]), ("is_first", [1, 0, 0], [0, 1, 0])):
        assert [float(stack[fact][0]) for stack in rack["stacks"]] == here
        assert [float(stack[fact][0]) for stack in moved] == there  # the twin: what a copy would have said
    facts = ("is_local", "is_first")
    for stack, source_stack in zip(rack["stacks"], moved, strict=True):
        assert_same(*({k: v for k, v in tree.items() if k not in facts} for tree in (stack, source_stack)))


def test_a_rack_that_is_only_assembled_is_a_finished_run(
    runs: dict[str, Path], tiny_corpus: Corpus, tmp_path: Path
) -> None:
    config = fused_config([str(runs["causal"]), f"{runs['causal']}:0"], "all", "", [], name="fused")
    result = finished(config, tiny_corpus, tmp_path / "fused")
    assert result.held_out == {}
    trained = load_trained(tmp_path / "fused", merged=False)
    assert (trained.finished, trained.step, len(trained.rack["stacks"])) == (True, 0, 3)
    assert_same(trained.rack["stacks"][2], load_trained(runs["causal"], merged=False).rack["stacks"][0])
    # It continues to nothing, and is a source itself.
    assert_same(finished(config, tiny_corpus, tmp_path / "fused").rack, result.rack)
    again = fused_config([f"{tmp_path / 'fused'}:1-2"], "all", "", [], name="again")
    assert_same(assembled(again, tiny_corpus)["stacks"], result.rack["stacks"][1:])


def test_a_masked_run_is_fused_causally(runs: dict[str, Path], tiny_corpus: Corpus, tmp_path: Path) -> None:
    """Objective and attention are switched; the trunk stays as it is, in 4 bits, and the last stack and head move."""
    overrides = ["objective.name=clm", "model.attention=causal"]
    config = fused_config([str(runs["masked"])], "last:1", "2 steps", overrides, name="fused")
    assert (config.objective.name, config.model.attention, config.precision.trunk) == ("clm", "causal", "nf4")
    result = finished(config, tiny_corpus, tmp_path / "fused")
    (phase,) = result.plan.phases
    assert (phase.main.task.objective, phase.main.task.attention) == ("clm", "causal")
    assert phase.cached
    assert set(result.held_out["fusion_0000"]) == {"loss", "bits_per_byte"}
    source, frozen = stored(runs["masked"]), stored(tmp_path / "fused")
    assert_same((frozen.stacks[0], frozen.embedding), (source.stacks[0], source.embedding))
    assert differs(frozen.stacks[1], source.stacks[1])
    assert differs(frozen.head, source.head)


# --- refusals ---


def test_sources_are_taken_apart() -> None:
    assert parse_sources(" a ;b:1; c:0-2 ") == [(Path("a"), 0, None), (Path("b"), 1, 1), (Path("c"), 0, 2)]
    for text, words in (("", "names no run"), ("a:3-1", "give the first stack before the last")):
        with pytest.raises(UserError, match=words):
            parse_sources(text)


def test_what_cannot_be_fused_is_refused_in_one_line(
    runs: dict[str, Path], tiny: Any, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    begun = loop.Run(tiny(**SHORT), tiny_corpus, tmp_path / "begun", lambda _: None)
    begun.folder.close()
    causal = str(runs["causal"])
    config = fused_config([causal], "all", "", [], name="fused")

    def refusal(sources: str, **model: Any) -> str:
        fusion = dataclasses.replace(config.training.fusion, sources=sources)
        training = dataclasses.replace(config.training, fusion=fusion)
        changed = dataclasses.replace(config, training=training, model=dataclasses.replace(config.model, **model))
        with pytest.raises(UserError) as caught:
            assembled(changed, tiny_corpus)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "config.json is missing" in refusal(str(tmp_path / "nowhere"))
    assert "is not finished; run it to its end" in refusal(str(tmp_path / "begun"))
    assert "has stacks 0 to 1, not 1 to 2" in refusal(f"{causal}:1-2")
    assert "has stacks 0 to 1, not 2 to 2" in refusal(f"{causal}:2")
    assert "hold 4 blocks, and model.architecture describes 2" in refusal(f"{causal}; {causal}")
    assert "have other shapes" in refusal(causal, d_ff=64)
    assert "have other shapes" in refusal(causal, vocab_size=400)
    assert "trained with another model.kernel" in refusal(causal, kernel=KernelConfig(seed=1))
    assert "trained with another model.experts" in refusal(causal, experts=ExpertsConfig(active=1))
    assert "has a table of its own; set model.ties_embedding=False" in refusal(causal, ties_embedding=True)


def test_another_tokenizer_is_refused(runs: dict[str, Path], tiny_corpus: Corpus) -> None:
    config = fused_config([str(runs["causal"])], "all", "", [], name="fused")
    other = copy.copy(tiny_corpus.tokenizer)
    other.digest = "another"
    with pytest.raises(UserError, match=r"was trained with another tokenizer; give its tokenizer\.model"):
        list(assemble(config, other, lambda _: None))
