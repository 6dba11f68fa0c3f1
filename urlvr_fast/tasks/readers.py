"""Rows of a data set, wherever it is: a JSONL, JSON or Parquet file, a directory saved by `datasets`, or a name on the Hugging Face hub.

Every reader yields `Row`s lazily, so that a limit stops the reading, and says in `where` what a person would look for: the file
and the line, or the data set and the row (both counted from 1 for lines and from 0 for rows, as editors and data frames do).
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from urlvr_fast.errors import ExplainedError

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.+-]+)?")


class DataError(ExplainedError, ValueError):
    """Prompts that cannot be used. The message names the file and the line or row, and what would be right."""

    exit_status = 2


class Row(NamedTuple):
    where: str  # such as "prompts.jsonl, line 3"
    values: dict[str, Any]


def read_rows(spec: str, split: str) -> Iterator[Row]:
    """The rows of a file, of a directory saved by `datasets`, or of a hub data set `owner/name[:config]`.

    `split` chooses among the splits of a data set that has them; a file is one split. Raises DataError.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        return read_saved_dataset(path, split)
    if path.is_file():
        return read_file(path)
    if path.suffix.lower() in FILE_SUFFIXES:
        raise DataError(missing_file(path))
    if HUB_NAME.fullmatch(spec):
        return read_hub_dataset(spec, split)
    raise DataError(missing_file(path))


def missing_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no file {path}: the folder {folder} does not exist either"
    present = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in FILE_SUFFIXES or entry.is_dir())
    near = difflib.get_close_matches(path.name, present, 3, 0.5)
    if near:
        return f"there is no file {path}; near it in {folder}: {', '.join(near)}"
    data_files = [name for name in present if Path(name).suffix.lower() in FILE_SUFFIXES]
    listed = f"{', '.join(data_files[:10])}{' …' if len(data_files) > 10 else ''}" if data_files else "none"
    return f"there is no file {path}; data files in {folder}: {listed}"


def read_file(path: Path) -> Iterator[Row]:
    reader = {".jsonl": read_jsonl, ".json": read_json, ".parquet": read_parquet}.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot tell the format; a data file ends in {', '.join(FILE_SUFFIXES)}")
    return reader(path)


def read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                values = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None
            except json.JSONDecodeError as error:
                raise DataError(f"{where}, column {error.colno}: not valid JSON ({error.msg})") from None
            yield Row(where, as_object(values, where))


def read_json(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        hint = "; a file with one object per line must be named .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}){hint}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: must hold a list of objects, not {json_name(rows)}")
    for number, values in enumerate(rows):
        where = f"{path}, row {number}"
        yield Row(where, as_object(values, where))


def read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    yield Row(f"{path}, row {number}", values)
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error})") from None


def read_saved_dataset(path: Path, split: str) -> Iterator[Row]:
    import datasets

    if not (path / "dataset_dict.json").is_file() and not (path / "dataset_info.json").is_file():
        files = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in FILE_SUFFIXES)
        hint = f"; name one of its files: {', '.join(files[:10])}" if files else ""
        raise DataError(f"{path} is a folder, but not one that `Dataset.save_to_disk` wrote{hint}")
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises whatever the part that failed raises
        raise DataError(f"{path}: `datasets` cannot load it ({type(error).__name__}: {error})") from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise DataError(f"{path} has no split {split!r}; it has {', '.join(dataset)}")
        dataset = dataset[split]
    return dataset_rows(dataset, str(path))


def read_hub_dataset(spec: str, split: str) -> Iterator[Row]:
    import datasets

    name, _, config = spec.partition(":")
    try:
        dataset = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # network, authentication, unknown name, unknown split: all of the library's own kinds
        raise DataError(
            f"{spec} is neither a file or folder here nor a data set that `datasets` can load with split {split!r} "
            f"({type(error).__name__}: {error})"
        ) from error
    return dataset_rows(dataset, f"{spec} [{split}]")


def dataset_rows(dataset: Any, name: str) -> Iterator[Row]:
    for number, values in enumerate(dataset):
        yield Row(f"{name}, row {number}", dict(values))


def as_object(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise DataError(f'{where}: must be an object such as {{"prompt": …}}, not {json_name(values)}')
    return values


def json_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
