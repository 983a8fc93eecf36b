"""TensorFlow Datasets as a source, without TensorFlow: `tfds:NAME[/CONFIG][:VERSION][#SPLIT]`.

A data set is read from its prepared files alone (ArrayRecord, at random access): the code that made them is not
imported, nothing is downloaded and no connection is opened. Preparing it is another step, `download_datasets`, that a
person asks for.
"""

import dataclasses
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stackwise_jax.data.files import OnRead
from stackwise_jax.errors import UserError, did_you_mean

PREFIX = "tfds:"
FILE_FORMAT = "array_record"  # tfrecord needs TensorFlow; parquet loses examples without an error (4.9.10)
DEFAULT_SPLIT = "train"
_ENTRY = re.compile(r"tfds:(?P<name>[A-Za-z]\w*(/[\w+.-]+)?(:[\d*]+\.[\d*]+\.[\d*]+)?)(#(?P<split>.+))?")
_EXAMPLES_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One split of a prepared data set.

    Attributes:
      name: as TensorFlow Datasets writes it, with config and version.
      split: in its language: "train", "train[:10%]", "train+test".
      builder: its read-only builder.
    """

    name: str
    split: str
    builder: Any = dataclasses.field(compare=False)

    @property
    def files(self) -> list[Path]:
        """The files that hold the examples of all splits."""
        return sorted(Path(path) for path in Path(self.builder.data_path).glob(f"*.{FILE_FORMAT}*"))

    def documents(self, text_field: str, on_read: OnRead) -> Iterator[str]:
        """Yields the text of every example.

        Raises:
          UserError: there is no such field, it is no text, or the files are damaged.
        """
        fields = list(self.builder.info.features or ())
        if text_field not in fields:
            raise UserError(
                f'{PREFIX}{self.name} has no field data.text_field="{text_field}"; its fields: '
                f"{', '.join(fields)}.{did_you_mean(text_field, fields)}"
            )
        n_bytes, n_told = sum(path.stat().st_size for path in self.files), 0
        place = f"{PREFIX}{self.name}#{self.split}"
        try:
            source = self.builder.as_data_source(self.split)
            for begin in range(0, len(source), _EXAMPLES_AT_ONCE):
                numbers = range(begin, min(begin + _EXAMPLES_AT_ONCE, len(source)))
                place = f"{PREFIX}{self.name}#{self.split}, examples {begin} to {numbers.stop - 1}"
                examples = source.__getitems__(numbers)
                on_read(n_bytes * numbers.stop // len(source) - n_told)
                n_told = n_bytes * numbers.stop // len(source)
                yield from (_text_of(example[text_field], place) for example in examples)
        except UserError:
            raise
        except (RuntimeError, OSError, ValueError, IndexError) as error:
            raise UserError(f"{place}: cannot be read ({_first_line(error)}); prepare the data set again") from None


def _text_of(value: object, place: str) -> str:
    if value is None:  # what a damaged file may give
        raise UserError(f"{place}: cannot be read; prepare the data set again")
    if not isinstance(value, bytes | str):
        raise UserError(f"{place}: data.text_field must name text, not {type(value).__name__}")
    try:
        return value if isinstance(value, str) else value.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8 text: byte {value[error.start]:#04x} at {error.start}") from None


def open_dataset(entry: str, tfds_dir: str) -> Dataset:
    """Opens a prepared data set.

    Args:
      entry: `tfds:NAME[/CONFIG][:VERSION][#SPLIT]`.
      tfds_dir: the folder of all data sets; empty: $TFDS_DATA_DIR or ~/tensorflow_datasets.

    Raises:
      UserError: no such name, not prepared, prepared in a format that needs TensorFlow, no such split, or TensorFlow
        Datasets is not installed.
    """
    name, split = _parse(entry)
    builder = _prepared_builder(name, tfds_dir)
    if builder is None:
        _require_known(name, tfds_dir)
        raise UserError(
            f"{PREFIX}{name} is not prepared in {_folder(tfds_dir)}; `python -m stackwise_jax.prepare --download` with "
            "the same --config downloads and prepares it, or name its folder in data.tfds_dir"
        )
    if (form := builder.info.file_format.value) != FILE_FORMAT:
        raise UserError(
            f"{PREFIX}{name} lies in {builder.data_path} as {form}, which cannot be read without TensorFlow; name "
            "another data.tfds_dir and prepare it there with `python -m stackwise_jax.prepare --download`"
        )
    try:
        n_examples = builder.info.splits[split].num_examples
    except (ValueError, KeyError) as error:
        splits = list(builder.info.splits)
        hint = did_you_mean(split, splits)
        raise UserError(
            f"{PREFIX}{name} has no split {split!r} ({_first_line(error)}); its splits: {', '.join(splits)}.{hint}"
        ) from None
    if not n_examples:
        raise UserError(f"{PREFIX}{name}#{split} holds no examples; name another split after #")
    return Dataset(str(builder.info.full_name), split, builder)


def download_datasets(sources: list[str], tfds_dir: str, report: Callable[[str], None]) -> None:
    """Downloads and prepares every data set of the sources that is not prepared yet, as ArrayRecord.

    Raises:
      UserError: no such name, no network, or a builder that needs TensorFlow or Apache Beam, which are not installed.
    """
    entries = [entry.strip() for source in sources for entry in source.split(",")]
    for name in dict.fromkeys(_parse(entry)[0] for entry in entries if entry.startswith(PREFIX)):
        if _prepared_builder(name, tfds_dir) is not None:
            report(f"{PREFIX}{name} is prepared")
            continue
        _require_known(name, tfds_dir)
        tfds = _tfds()
        report(f"preparing {PREFIX}{name} in {_folder(tfds_dir)}")
        try:
            builder = tfds.builder(name, data_dir=_folder(tfds_dir), file_format=FILE_FORMAT)
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        except Exception as error:  # whatever a builder does
            if "tensorflow" in str(error).lower() and isinstance(error, ImportError):
                hint = "; its builder needs TensorFlow to prepare it (reading does not): pip install tensorflow"
            else:
                hint = ""
            raise UserError(f"{PREFIX}{name} cannot be prepared: {_first_line(error)}{hint}") from None


def _parse(entry: str) -> tuple[str, str]:
    """('glue/cola:2.0.0', 'train') of 'tfds:glue/cola:2.0.0'."""
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise UserError(f"data source {entry!r} must read {PREFIX}NAME[/CONFIG][:VERSION][#SPLIT]")
    return match["name"], match["split"] or DEFAULT_SPLIT


def _tfds() -> types.ModuleType:
    """TensorFlow Datasets with every builder that it and we have."""
    try:
        import tensorflow_datasets as tfds

        tfds.core  # noqa: B018 -- the import hides what failed inside it
        import tensorflow_datasets.text

        import stackwise_jax.data.builders  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f'a data source that begins with {PREFIX} needs TensorFlow Datasets: pip install "stackwise-jax[tfds]" '
            f"({error})"
        ) from None
    except (AttributeError, ImportError) as error:
        raise UserError(
            f"TensorFlow Datasets is installed but does not import ({error}), often for a protobuf that is too old; "
            "run `pip check`"
        ) from None
    return tfds


def _prepared_builder(name: str, tfds_dir: str) -> Any | None:
    """A builder of the prepared files; None where there are none."""
    tfds = _tfds()
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    try:
        return builder_from_files(name, data_dir=_folder(tfds_dir))
    except tfds.core.DatasetNotFoundError:
        return None


def _require_known(name: str, tfds_dir: str) -> None:
    """UserError for a name that is neither in the catalog nor ours."""
    known = _tfds().list_builders(with_community_datasets=False)
    bare = re.split("[/:]", name)[0]
    if bare not in known:
        hint = did_you_mean(bare, known)
        raise UserError(f"{PREFIX}{bare} is not in {_folder(tfds_dir)} nor in the catalog that is installed.{hint}")


def _folder(tfds_dir: str) -> str:
    return str(Path(tfds_dir or _tfds().core.constants.DATA_DIR).expanduser())


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
