"""Numbers that are none, a disk without room, a device without memory: stopped or survived, said, and nothing lost."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.errors import UserError
from stackwise_jax.train import branches, checkpoint, loop
from stackwise_jax.train.folder import newest_snapshot


@pytest.fixture
def config(tiny: Any) -> Any:
    """Ten updates in two phases, a snapshot every third of a phase."""
    return tiny(model__architecture__n_stacks=1, checkpoint__every_steps=3, logging__every_steps=1)


def spoil_step(monkeypatch: pytest.MonkeyPatch, at: int, spoil: Callable[[Any, Any], tuple[Any, Any]]) -> None:
    """Has the result of update number `at`, counted from 1, go through `spoil`."""
    make = branches.make_train_step

    def make_spoiled(*args: Any) -> Any:
        step_function = make(*args)

        def step(*operands: Any) -> Any:
            result = step_function(*operands)
            return spoil(*result) if int(operands[-1]) == at - 1 else result

        return step

    monkeypatch.setattr(branches, "make_train_step", make_spoiled)


def metric(name: str, value: float) -> Callable[[Any, Any], tuple[Any, Any]]:
    return lambda state, metrics: (state, {**metrics, name: jnp.float32(value)})


def weights(state: Any, metrics: Any) -> tuple[Any, Any]:
    leaves, structure = jax.tree.flatten(state)
    leaves = [leaf * jnp.nan if leaf.dtype == jnp.float32 else leaf for leaf in leaves]
    return jax.tree.unflatten(structure, leaves), metrics


def assert_stored_is_finite(folder: Path, before: int) -> None:
    """What lies in the run folder is sound and older than the fault."""
    snapshot, damaged = newest_snapshot(folder)
    assert not damaged
    if snapshot is not None:
        assert snapshot.meta["step"] < before
        trees = (snapshot.state, snapshot.frozen.stacks, snapshot.frozen.embedding, snapshot.frozen.head)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trees))


@pytest.mark.parametrize(
    ("at", "spoil", "said"),
    [
        (1, metric("loss", float("nan")), r"loss=nan .* at phase step 1; .*lower optimizer\.learning_rate"),
        (3, metric("loss", float("inf")), "loss=inf .* at phase step 3"),  # a snapshot is due right after it
        (4, metric("gradient_norm", float("inf")), "gradient norm=inf at phase step 4"),  # the last of its phase
        (9, metric("gradient_norm", float("nan")), "gradient norm=nan at phase step 5"),
        (3, weights, "not finite after 3 steps, at step 3 of phase embedding"),
        (10, weights, "held-out loss=nan in phase stack_0000 after 10 steps"),
    ],
    ids=["first loss", "loss", "last gradient", "gradient", "weights at a snapshot", "weights at the end"],
)
def test_what_is_no_number_is_not_stored(
    at: int,
    spoil: Any,
    said: str,
    config: Any,
    tiny_corpus: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil_step(monkeypatch, at, spoil)
    with pytest.raises(UserError, match=said):
        loop.run(config, tiny_corpus, tmp_path / "run", say=lambda _: None)
    assert_stored_is_finite(tmp_path / "run", at)


def test_a_moment_that_is_no_number_is_not_settled(
    config: Any, tiny_corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss does not see it yet, and neither does the held-out loss."""

    def spoil(state: Any, metrics: Any) -> Any:
        bad = jax.tree.map(lambda leaf: leaf + jnp.inf if leaf.dtype == jnp.float32 else leaf, state.optimizer)
        return loop.TrainState(state.params, bad), metrics

    spoil_step(monkeypatch, 4, spoil)
    with pytest.raises(UserError, match="not finite after 4 steps"):
        loop.run(config, tiny_corpus, tmp_path / "run", say=lambda _: None)
    assert_stored_is_finite(tmp_path / "run", 4)


def test_a_cache_that_is_no_number_is_not_trained_on(config: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    run = loop.Run(config, tiny_corpus, tmp_path / "run", lambda _: None)
    training_batch = run.inputs.training_batch

    def poisoned(phase: Any, batch: Any, index: int) -> Any:
        batch, activations = training_batch(phase, batch, index)
        return batch, activations * jnp.nan if index == 6 and activations is not None else activations

    run.inputs.training_batch = poisoned
    with pytest.raises(UserError, match=r"loss=nan .* at phase step 3"):
        run.to_end()
    assert_stored_is_finite(tmp_path / "run", 7)


def test_without_the_check_it_would_be_stored(
    config: Any, tiny_corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: the weights of step 3 are in the snapshot of step 3 unless something looks."""
    spoil_step(monkeypatch, 3, weights)
    monkeypatch.setattr(loop, "require_finite", lambda *_: None)
    with pytest.raises(UserError, match="loss=nan"):
        loop.run(config, tiny_corpus, tmp_path / "run", say=lambda _: None)
    with pytest.raises(AssertionError):
        assert_stored_is_finite(tmp_path / "run", 3)


def test_a_full_disk_between_boundaries_is_survived(
    config: Any, tiny_corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Snapshots inside phases find no room."""
    whole = loop.run(config, tiny_corpus, tmp_path / "whole", say=lambda _: None)
    write = checkpoint._write_contents

    def full(path: Path, arrays: Any, meta: Any, digests: Any) -> None:
        if "position" in meta and meta["position"]["phase_step"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, arrays, meta, digests)

    monkeypatch.setattr(checkpoint, "_write_contents", full)
    again = loop.run(config, tiny_corpus, tmp_path / "run", say=lambda _: None)
    for one, other in zip(jax.tree.leaves(whole.rack), jax.tree.leaves(again.rack), strict=True):
        np.testing.assert_array_equal(one, other)
    said = [line for line in capsys.readouterr().err.splitlines() if "No space left" in line]
    assert len(said) == 2  # once, and once more after it had worked in between
    assert "the run goes on and tries again; saved so far: nothing" in said[0]
    assert {path.name for path in (tmp_path / "run" / "steps").iterdir()} == {"00000004-0001", "00000010-0002"}


def test_a_full_disk_at_a_boundary_stops_and_is_continued(
    config: Any, tiny_corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loop.run(config, tiny_corpus, tmp_path / "whole", say=lambda _: None)
    run = loop.Run(config, tiny_corpus, tmp_path / "run", lambda _: None)  # it looks for room for a cache itself
    usage = checkpoint.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        free = {"steps": usage.free, "stacks": 1000}
        patch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=free[path.name]))
        with pytest.raises(UserError, match=r"No space left on device .* 1000 B are free\); .* run the same command"):
            run.to_end()
    snapshot, _ = newest_snapshot(tmp_path / "run")
    assert snapshot is not None
    assert snapshot.meta["step"] == 3
    assert not list((tmp_path / "run").rglob("*.tmp"))
    again = loop.run(config, tiny_corpus, tmp_path / "run", say=lambda _: None)
    for one, other in zip(jax.tree.leaves(whole.rack), jax.tree.leaves(again.rack), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_device_without_memory_is_a_few_lines(
    config: Any, tiny_corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a stand-in: 128 TiB are asked for."""
    spoil_step(monkeypatch, 6, lambda state, metrics: (jnp.zeros(1 << 45).block_until_ready(), metrics))
    with pytest.raises(UserError) as caught:
        loop.run(config, tiny_corpus, tmp_path / "run", say=lambda _: None)
    text = str(caught.value)
    assert text.startswith("out of memory in phase stack_0000: RESOURCE_EXHAUSTED")
    assert "most of it workspace " in text  # the model is small beside what its kernels need
    for field in ("training.remat=full", "accumulation_steps", "loss_chunk_tokens", "data.seq_len", "cache.tier=host"):
        assert field in text
    assert len(text.splitlines()) == 3
    assert_stored_is_finite(tmp_path / "run", 6)


def test_any_other_fault_keeps_its_traceback(
    config: Any, tiny_corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(state: Any, metrics: Any) -> Any:
        raise RuntimeError("a fault of ours")

    spoil_step(monkeypatch, 2, fault)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        loop.run(config, tiny_corpus, tmp_path / "run", say=lambda _: None)
