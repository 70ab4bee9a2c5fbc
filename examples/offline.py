"""What batch inference with Ray and with torchrun share: finding images, reading them, and the table of results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
from classifier import BadImage, Classifier, Preprocessing, probabilities
from pyarrow import fs

SUFFIXES = (".jpg", ".jpeg", ".png")
MAX_BYTES = 100 * 2**20
# A row of an unreadable image has its error and no classes; `classes` are numbers, from the most probable on.
RESULTS = pa.schema(
    [
        ("key", pa.string()),
        ("error", pa.string()),
        ("classes", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.string())),
        ("probabilities", pa.list_(pa.float32())),
    ]
)


class Storage:
    """A folder or file, on this machine's disk or where a URI leads (s3://, gs://, …).

    Args:
        place: a path, or a URI that pyarrow knows.
    """

    def __init__(self, place: str) -> None:
        self.filesystem, self.root = fs.FileSystem.from_uri(place if "://" in place else str(Path(place).resolve()))

    def files(self, suffixes: tuple[str, ...]) -> list[str]:
        """Names, relative to the folder and sorted, of the files in it and below that end so; or the one file itself, as "".

        Raises:
            FileNotFoundError: there is none.
        """
        if self.filesystem.get_file_info(self.root).type == fs.FileType.File:
            return [""] if self.root.lower().endswith(suffixes) else []
        found = self.filesystem.get_file_info(fs.FileSelector(self.root, recursive=True))
        paths = [info.path for info in found if info.type == fs.FileType.File and info.path.lower().endswith(suffixes)]
        return sorted(path[len(self.root) :].lstrip("/") for path in paths)

    def path(self, name: str) -> str:
        """The whole path of a file of `files`."""
        return f"{self.root}/{name}" if name else self.root

    def read(self, name: str) -> bytes:
        """A file's content.

        Raises:
            BadImage: it can't be read, or is too large for an image.
        """
        try:
            with self.filesystem.open_input_file(self.path(name)) as file:
                if file.size() > MAX_BYTES:
                    raise BadImage(f"The file has {file.size()} bytes; an image may have {MAX_BYTES}.")
                return file.read()
        except OSError as error:
            raise BadImage(f"The file can't be read: {error}") from error


def is_parquet(storage: Storage) -> bool:
    """Whether the input is Parquet: a file, or a folder with such files in it."""
    return bool(storage.files((".parquet",)))


def stored_bytes(value: Any) -> bytes:
    """The image file in a cell of a Parquet column: bytes, or a struct with `bytes` as Hugging Face's datasets have it."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise BadImage("The row has no bytes of an image.")
    return data


def decode(preprocessing: Preprocessing, read: Callable[[Any], bytes], items: Iterable[Any]) -> dict[str, list[Any]]:
    """Reads and decodes images, one after the other.

    Args:
        read: gives the bytes of an image file, or raises BadImage.
        items: what `read` takes.

    Returns:
        "image": an array for the model for each item; "error": "" for each, or why there is no image. It is then black, so
        that every batch has the same shape.
    """
    images, errors = [], []
    for item in items:
        try:
            images.append(preprocessing.decode(read(item)))
            errors.append("")
        except BadImage as error:
            images.append(np.zeros((*preprocessing.preset.crop_size * 2, 3), np.uint8))
            errors.append(str(error))
    return {"image": images, "error": errors}


def classify(
    classifier: Classifier, keys: Sequence[str], images: Sequence[np.ndarray], errors: Sequence[str], top: int
) -> pa.Table:
    """The results of a batch, in the schema RESULTS."""
    chances = probabilities(classifier(images))
    best = np.argsort(-chances, axis=1, kind="stable")[:, :top]
    given = lambda rows: [None if error else row for row, error in zip(rows, errors, strict=True)]  # noqa: E731
    columns = {
        "key": [str(key) for key in keys],
        "error": [error or None for error in errors],
        "classes": given(best.tolist()),
        "labels": given([[classifier.labels[i] for i in row] for row in best]),
        "probabilities": given(np.take_along_axis(chances, best, 1).tolist()),
    }
    return pa.table(columns, schema=RESULTS)


def summary(output: Storage) -> tuple[int, int]:
    """How many rows the Parquet files of results have, and how many of them an error.

    Only the column of errors is read.
    """
    paths = [output.path(name) for name in output.files((".parquet",))]
    if not paths:
        return 0, 0
    table = pyarrow.dataset.dataset(paths, RESULTS, filesystem=output.filesystem).to_table(columns=["error"])
    return len(table), len(table) - table["error"].null_count
