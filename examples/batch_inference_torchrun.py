"""Classifies a folder or Parquet files of images with torchrun, on one machine or many; results are Parquet files.

pip install resnet_fused torchvision pyarrow
torchrun --nproc-per-node 2 examples/batch_inference_torchrun.py images/ results/ --model resnet50 --checkpoint weights.pth

The images are cut into chunks, and each process does its share of them. A chunk's results are one file, which appears when it
is complete. So the same command, run again after a failure, with as many processes or others, does only what is missing, and
nothing is lost or doubled; `torchrun --max-restarts 3` does that by itself. An image that can't be read is a row with a reason.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from classifier import add_arguments, load
from offline import SUFFIXES, Storage, classify, decode, is_parquet, stored_bytes, summary

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Chunk:
    """Some of the images.

    Attributes:
        file: the Parquet file that they are in; None for files of their own.
        names: those files.
        row_group: which one of the Parquet file.
    """

    file: str | None
    names: tuple[str, ...] = ()
    row_group: int = 0


def chunks_of(storage: Storage, rows: int) -> list[Chunk]:
    """The chunks, the same in every process and every run: files by their names, `rows` in each, or Parquet's row groups.

    Raises:
        FileNotFoundError: there is no image.
    """
    if is_parquet(storage):
        found = []
        for name in storage.files((".parquet",)):
            groups = pq.ParquetFile(storage.path(name), filesystem=storage.filesystem).num_row_groups
            found += [Chunk(name, row_group=group) for group in range(groups)]
        return found
    names = storage.files(SUFFIXES)
    if not names:
        raise FileNotFoundError(f"{storage.root} has no file that ends in {', '.join(SUFFIXES)} or .parquet.")
    return [Chunk(None, tuple(names[i : i + rows])) for i in range(0, len(names), rows)]


def check_manifest(output: Storage, arguments: argparse.Namespace, chunks: Sequence[Chunk]) -> None:
    """Writes down what is computed here, or compares with what was written down by an earlier run.

    Raises:
        ValueError: that was something else, so its chunks can't be taken for ours.
    """
    asked = {key: value for key, value in vars(arguments).items() if key not in ("batch_size", "threads", "device", "output")}
    parameters = Path(arguments.checkpoint).read_bytes() if arguments.checkpoint else b""
    digests = {"chunks": repr(chunks).encode(), "checkpoint's content": parameters}
    manifest = asked | {name: hashlib.sha256(data).hexdigest() for name, data in digests.items()}
    path = output.path(MANIFEST)
    output.filesystem.create_dir(output.root, recursive=True)
    if MANIFEST in output.files((MANIFEST,)):
        with output.filesystem.open_input_file(path) as file:
            earlier = json.loads(file.read())
        different = sorted(key for key in {*manifest, *earlier} if manifest.get(key) != earlier.get(key))
        if different:
            raise ValueError(
                f"{output.root} has results of another run, which differs in: {', '.join(different)}. Give the same input and "
                "options, or another folder."
            )
    else:
        with output.filesystem.open_output_stream(path) as file:
            file.write(json.dumps(manifest, indent=1).encode())


def batches(
    storage: Storage, chunk: Chunk, arguments: argparse.Namespace, preprocessing: Any, pool: ThreadPoolExecutor
) -> Iterator[tuple[list[str], dict[str, list[Any]]]]:
    """Keys and images of a chunk, batch by batch. The next batch is decoded while the caller computes with this one."""
    if chunk.file is None:
        keys, items, read = list(chunk.names), list(chunk.names), storage.read
    else:
        table = pq.ParquetFile(storage.path(chunk.file), filesystem=storage.filesystem).read_row_group(
            chunk.row_group, columns=[arguments.key_column, arguments.image_column]
        )
        keys, items, read = table[arguments.key_column].to_pylist(), table[arguments.image_column].to_pylist(), stored_bytes

    def begin(start: int) -> list[Future[dict[str, list[Any]]]]:
        part = items[start : start + arguments.batch_size]
        share = max(1, -(-len(part) // arguments.threads))
        return [pool.submit(decode, preprocessing, read, part[i : i + share]) for i in range(0, len(part), share)]

    ahead = begin(0)
    for start in range(0, len(items), arguments.batch_size):
        parts, ahead = [future.result() for future in ahead], begin(start + arguments.batch_size)
        yield (
            keys[start : start + arguments.batch_size],
            {name: [value for part in parts for value in part[name]] for name in ("image", "error")},
        )


def write(output: Storage, name: str, table: pa.Table) -> None:
    """Writes a file that either is there and whole, or isn't there."""
    path, part = output.path(name), output.path(f"{name}.{os.getpid()}.part")
    with output.filesystem.open_output_stream(part) as file:
        pq.write_table(table, file)
    output.filesystem.move(part, path)


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    result.add_argument(
        "input", help="folder with JPEG and PNG files, or a Parquet file or folder: a path, or a URI that pyarrow knows"
    )
    result.add_argument("output", help="folder for the results, which all processes can write to")
    result.add_argument(
        "--image-column", default="image", help="Parquet: column with the image files' bytes (default: %(default)s)"
    )
    result.add_argument("--key-column", default="key", help="Parquet: column that names an image (default: %(default)s)")
    result.add_argument("--top", type=int, default=5, help="classes a row (default: %(default)s)")
    result.add_argument("--batch-size", type=int, default=16, help="images in one call of the model (default: %(default)s)")
    result.add_argument(
        "--chunk-rows",
        type=int,
        default=1024,
        help="images in a chunk, for files; what a failure costs at most (default: %(default)s)",
    )
    result.add_argument(
        "--threads", type=int, default=1, help="threads of each process, to compute and to decode (default: %(default)s)"
    )
    add_arguments(result)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    # Processes meet here only at the beginning and at the end, when one may have much more to do than another.
    dist.init_process_group("gloo", timeout=timedelta(days=1))
    rank, world = dist.get_rank(), dist.get_world_size()
    storage, output = Storage(arguments.input), Storage(arguments.output)
    # One process lists the input, so that all have the same list.
    shared: list[Any] = [chunks_of(storage, arguments.chunk_rows) if rank == 0 else None]
    if rank == 0:
        check_manifest(output, arguments, shared[0])
    dist.broadcast_object_list(shared)
    chunks: list[Chunk] = shared[0]
    names = [f"chunk-{number:06d}.parquet" for number in range(len(chunks))]
    done = set(output.files((".parquet",)))
    own = [number for number in range(rank, len(chunks), world) if names[number] not in done]
    if arguments.device == "cuda":
        arguments.device = f"cuda:{os.environ['LOCAL_RANK']}"
    start, rows = time.perf_counter(), 0
    classifier = load(arguments) if own else None
    with ThreadPoolExecutor(arguments.threads) as pool:
        for position, number in enumerate(own, 1):
            tables = [
                classify(classifier, keys, found["image"], found["error"], arguments.top)
                for keys, found in batches(storage, chunks[number], arguments, classifier.preprocessing, pool)
            ]
            table = pa.concat_tables(tables)
            write(output, names[number], table)
            rows += len(table)
            rate = rows / (time.perf_counter() - start)
            print(f"process {rank} of {world}: {position} of {len(own)} chunks, {rate:.1f} images/s", flush=True)
    dist.barrier()
    if rank == 0:
        missing = set(names) - set(output.files((".parquet",)))
        if missing:
            sys.exit(f"{len(missing)} of {len(names)} chunks are missing in {output.root}; run the same command again.")
        written, errors = summary(output)
        print(f"{written} rows in {output.root}, {errors} of them unreadable; {len(done)} of {len(names)} chunks were there")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
