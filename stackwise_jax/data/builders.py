"""Builders of TensorFlow Datasets that the catalog lacks; importing this module registers them.

    from stackwise_jax.data import builders
    builders.LocalText(root="my/texts", data_dir="my/datasets", file_format="array_record").download_and_prepare()

after which `data.source="tfds:local_text"` with `data.tfds_dir="my/datasets"` reads it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from stackwise_jax.errors import UserError


class LocalText(tfds.core.GeneratorBasedBuilder, skip_registration=False):
    """Text files of a folder: one example each, with the fields `text` and `name`; one split, `train`."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, root: str = "", **settings: Any) -> None:
        """Takes the folder of `.txt` files (needed to prepare, not to read), then what every builder takes."""
        self._root = root
        super().__init__(**settings)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "name": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, description="Text files of a folder.", features=features)

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator[tuple[str, dict[str, str]]]]:
        del dl_manager  # nothing is downloaded
        if not self._root:
            raise UserError("local_text needs root, the folder of its .txt files: see stackwise_jax/data/builders.py")
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, str]]]:
        for path in sorted(Path(self._root).expanduser().glob("**/*.txt")):
            name = path.relative_to(Path(self._root).expanduser()).as_posix()
            yield name, {"text": path.read_text(encoding="utf-8"), "name": name}
