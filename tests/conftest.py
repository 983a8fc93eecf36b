"""Settings that every test runs under: CPU, fast compiles, no silent broadcasting, shapes checked at every call."""

import os

os.environ["JAX_PLATFORMS"] = os.environ.get("STACKWISE_TEST_PLATFORM", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":  # halves a suite that mostly compiles
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import gc
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
# Every run in a test compiles its own programs; those that an earlier test of any worker compiled come from here.
if "STACKWISE_TEST_COMPILED" not in os.environ:  # workers inherit it from the process that starts them
    COMPILED = tempfile.TemporaryDirectory(prefix="stackwise-compiled-")
    os.environ["STACKWISE_TEST_COMPILED"] = COMPILED.name
jax.config.update("jax_compilation_cache_dir", os.environ["STACKWISE_TEST_COMPILED"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
# Every module but types.py: JAX rebuilds its pytree classes around things that are not arrays; and data/permutation.py,
# whose integers are mixed tens of thousands of times in a run: a check costs many times what it checks.
CHECKED = ("ops", "models", "objectives", "memory", "train", "evals", "generate", "bench", "interop")
CHECKED += ("config", "checks", "report", "evaluate", "command")
DATA = Path(__file__).parents[1] / "stackwise_jax" / "data"
CHECKED += tuple(f"data.{path.stem}" for path in sorted(DATA.glob("*.py")) if path.stem != "permutation")
install_import_hook([f"stackwise_jax.{name}" for name in CHECKED], "beartype.beartype")

from stackwise_jax import config as config_lib
from stackwise_jax.data.corpus import Corpus, prepare_corpus
from stackwise_jax.schema import RunConfig

# One table of tolerances by dtype for comparisons that cannot be bitwise; tests use it and never loosen it.
TOLERANCE = {"float32": {"rtol": 2e-5, "atol": 2e-6}, "bfloat16": {"rtol": 2e-2, "atol": 2e-2}}


def pytest_collection_finish() -> None:
    """What modules hold stays to the end: the garbage collector need not go through it again and again."""
    gc.freeze()


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def tolerance() -> dict[str, dict[str, float]]:
    return TOLERANCE


WORDS = """
the of and to in is it that was for on are with his they at be this have from or one had by word but not what all were
we when your can said there use each which she do how their if will up other about out many then them
"""


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of forty small text files."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        draw = random.Random(number)
        (folder / f"{number:02d}.txt").write_text(" ".join(draw.choice(WORDS.split()) for _ in range(400)) + ".\n")
    return folder


TinyConfig = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def tiny(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyConfig:
    """Makes small configs on the tiny text: `tiny(training__mode="layerwise", seed=1)`."""
    cache = tmp_path_factory.mktemp("cache")

    def make(**overrides: Any) -> RunConfig:
        entries = config_lib.default()
        entries.model.update({"vocab_size": 320, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48})
        entries.model.architecture.n_stacks = 3
        entries.data.update({"source": f"{tiny_text}/*.txt", "seq_len": 32, "cache_dir": str(cache)})
        entries.data.max_rows = 240  # ten chunks
        entries.data.validation_fraction = 0.2
        entries.training.update({"batch_size": 4, "phase_budget": "6 steps", "embedding_budget": "4 steps"})
        entries.evaluation.rows = 16
        entries.cache.chunk_bytes = 100_000
        entries.update_from_flattened_dict({name.replace("__", "."): value for name, value in overrides.items()})
        return config_lib.resolve(entries)

    return make


@pytest.fixture(scope="session")
def tiny_corpus(tiny: TinyConfig) -> Corpus:
    """The corpus of every tiny config (unless it changes the data)."""
    return prepare_corpus(tiny(), report=lambda _: None)
