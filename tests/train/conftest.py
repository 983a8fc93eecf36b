"""What tests of several files of this folder begin with."""

from pathlib import Path
from typing import Any

import pytest

from stackwise_jax.data.corpus import Corpus
from stackwise_jax.train import loop

SHORT = {"training__phase_budget": "2 steps", "training__embedding_budget": "2 steps", "evaluation__rows": 8}


@pytest.fixture(scope="session")
def source(tiny: Any, tiny_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one stack whose token table others begin with; nobody writes to it."""
    folder = tmp_path_factory.mktemp("source") / "run"
    one_stack = {"training__mode": "end_to_end", "seed": 7, "model__architecture__n_stacks": 1, "checkpoint__keep": 1}
    loop.run(tiny(**SHORT, **one_stack), tiny_corpus, folder, say=lambda _: None)
    return folder
