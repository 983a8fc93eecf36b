"""A run on several devices is the run on one: losses, gradients, checkpoints; and each device holds its share."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from stackwise_jax import config as config_lib
from stackwise_jax.errors import UserError
from stackwise_jax.memory.placement import MATRICES, ONE_DEVICE, make_placement, split_axis
from stackwise_jax.models import weights
from stackwise_jax.schema import MeshConfig

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1e-5


@pytest.fixture(scope="module")
def seen(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `mesh_program.py` found, in a process of its own with eight devices."""
    folder = tmp_path_factory.mktemp("mesh")
    config = tiny(
        model__architecture__n_stacks=2, model__attention="bidirectional", objective__name="mlm",
        objective__mask_variants=2, training__mode="layerwise", training__batch_size=16,
        training__phase_budget="4 steps",
        training__embedding_budget="2 steps", training__loss_chunk_tokens=24, logging__every_steps=1,
        checkpoint__every_steps=2,
    )  # fmt: skip
    (folder / "config.json").write_text(config_lib.to_json(config))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, str(ROOT / "tests/laws/mesh_program.py"), str(folder), str(folder / "config.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_gradients_are_those_of_one_device(seen: dict[str, Any]) -> None:
    found = dict(seen["gradients"])
    assert found.pop("twin") > 0.1  # where only one device's rows counted
    assert len(found) == 5
    assert max(found.values()) < LIMIT, found


def test_muon_on_divided_matrices_is_muon(seen: dict[str, Any]) -> None:
    assert seen["muon"] < LIMIT


def test_losses_are_those_of_one_device_and_continued_on_another_number_in_any_tier(seen: dict[str, Any]) -> None:
    assert len(seen["runs"]) == 2
    assert max(seen["runs"].values()) < LIMIT, seen["runs"]


def test_each_device_holds_its_share_of_weights_and_moments(seen: dict[str, Any]) -> None:
    shares = seen["weights"]
    assert set(shares["matrices"]) == {1 / 4}
    assert set(shares["moments"]) == {1 / 4}
    assert set(shares["vectors"]) == {1.0}


def test_each_device_holds_its_share_of_every_chunk(seen: dict[str, Any]) -> None:
    for chunks in seen["chunks"].values():
        assert set(chunks["shares"]) == {1 / 8}
        assert chunks["difference"] == 0.0


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((8, 16), 1), ((16, 8), 0), ((9, 8), 1), ((64, 8, 16), 2), ((64, 9, 8), 2), ((64, 9, 9), None), ((8, 8), 0)],
)
def test_a_matrix_is_cut_along_the_larger_axis_that_can_be_and_never_along_blocks(
    shape: tuple[int, ...], axis: int | None
) -> None:
    assert split_axis(shape, 4) == axis
    assert split_axis(shape, 1) is None


@pytest.mark.parametrize("own", [{"use_bias": True}, {"experts__count": 4, "experts__shared": 1}])
def test_the_names_that_are_cut_are_those_of_matrices(own: dict[str, Any], tiny: Any) -> None:
    fields = {"token_types": 2, "head_transform": True, "logit_bias": True, "first_attention_norm": False}
    fields |= {"positions": "learned", "norm": "layernorm", **own}
    model = tiny(**{f"model__{name}": value for name, value in fields.items()}).model
    tables = (weights.block_table(model), weights.embedding_table(model), weights.head_table(model, tied=False))
    for path, weight in jax.tree_util.tree_leaves_with_path(tables, is_leaf=weights.is_weight):
        assert (jax.tree_util.keystr(path[-1:], simple=True) in MATRICES) == weight.is_matrix


def test_one_device_has_no_mesh_and_adds_nothing_to_a_program() -> None:
    assert make_placement(MeshConfig()) is ONE_DEVICE

    def touched(x: Any) -> Any:
        place = ONE_DEVICE
        whole = place.around_block(x.dtype)(lambda h, w: (place.as_rows(h) @ place.as_whole(w), None))
        return place.as_weights(place.as_chunk(whole(x, x)[0]))

    x = jax.numpy.ones((4, 4))
    assert str(jax.make_jaxpr(touched)(x)) == str(jax.make_jaxpr(lambda x: x @ x)(x))


def test_devices_that_are_not_there_are_refused() -> None:
    with pytest.raises(UserError, match=r"mesh.data=64 times mesh.fsdp=2 asks for 128 .*device_count=128"):
        make_placement(MeshConfig(data=64, fsdp=2))
