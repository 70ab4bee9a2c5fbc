"""Classifies a folder or Parquet files of images with Ray Data, on one machine or a cluster; results are Parquet files.

pip install "resnet_fused[ray]"
python examples/batch_inference_ray.py images/ results/ --model resnet50 --checkpoint weights.pth
ray job submit --working-dir examples -- python batch_inference_ray.py s3://bucket/images s3://bucket/results …

Images are read and decoded, then classified by actors, each of which fuses the model once; blocks of results are written as
they come. What a process or machine that dies was doing is done again. An image that can't be read is a row with the reason.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence

# Ray would otherwise report to its makers that it is used.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from classifier import Classifier, Preprocessing, add_arguments, load, weights_of
from offline import SUFFIXES, Storage, classify, decode, is_parquet, stored_bytes, summary


class Decode:
    """Adds to a batch of keys the images, decoded."""

    def __init__(self, preprocessing: Preprocessing, place: str, column: str | None) -> None:
        self.preprocessing, self.place, self.column = preprocessing, place, column

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.column is None:
            found = decode(self.preprocessing, Storage(self.place).read, batch["key"])
        else:
            found = decode(self.preprocessing, stored_bytes, batch[self.column])
        return {"key": batch["key"], "image": np.stack(found["image"]), "error": np.array(found["error"])}


class Classify:
    """An actor: loads and fuses the model once, then classifies batch after batch."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.set_num_threads(arguments.cpus_per_actor)
        self.classifier: Classifier = load(arguments)
        self.top = arguments.top

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        return classify(self.classifier, batch["key"], batch["image"], batch["error"], self.top)


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    result.add_argument(
        "input", help="folder with JPEG and PNG files, or a Parquet file or folder: a path, or a URI that pyarrow knows"
    )
    result.add_argument("output", help="folder for the results; it must have no Parquet files yet")
    result.add_argument(
        "--image-column", default="image", help="Parquet: column with the image files' bytes (default: %(default)s)"
    )
    result.add_argument("--key-column", default="key", help="Parquet: column that names an image (default: %(default)s)")
    result.add_argument("--top", type=int, default=5, help="classes a row (default: %(default)s)")
    result.add_argument("--batch-size", type=int, default=16, help="images in one call of the model (default: %(default)s)")
    result.add_argument(
        "--block-rows",
        type=int,
        default=256,
        help="images in a block, which is what is done again when a process dies (default: %(default)s)",
    )
    result.add_argument("--actors", type=int, help="copies of the model (default: as many as the cluster's CPUs or GPUs allow)")
    result.add_argument(
        "--cpus-per-actor", type=int, default=1, help="cores, and threads, of each; more saves memory (default: %(default)s)"
    )
    result.add_argument("--num-cpus", type=int, help="cores for Ray, when it is started here (default: those of this machine)")
    result.add_argument("--object-store-mb", type=int, help="Ray's shared memory, when it is started here (default: Ray's)")
    add_arguments(result)
    return result


def actors_of(arguments: argparse.Namespace, resources: dict[str, float]) -> int:
    """How many actors there are to be, so that a core is left for other tasks.

    Raises:
        ValueError: the cluster is too small for them: Ray would wait for ever.
    """
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    most, usual = ((cpus - left) // arguments.cpus_per_actor for left in (1, max(1, cpus // 8)))
    if arguments.device != "cpu":
        most, usual = min(most, gpus), min(usual, gpus)
    actors = arguments.actors or max(1, usual)
    if actors > most:
        raise ValueError(
            f"{actors} actors of {arguments.cpus_per_actor} CPUs don't fit a cluster of {cpus} CPUs and {gpus} GPUs, where a "
            "CPU is left for the rest. Lower --actors or --cpus-per-actor, raise --num-cpus, or add machines."
        )
    return actors


def dataset(arguments: argparse.Namespace) -> tuple[ray.data.Dataset, int, str | None]:
    """Rows with a key each, how many, and the column that has the images' bytes, if it is Parquet.

    Raises:
        FileNotFoundError: there is no image.
    """
    storage = Storage(arguments.input)
    if is_parquet(storage):
        rows = ray.data.read_parquet(arguments.input, columns=[arguments.key_column, arguments.image_column])
        return rows.rename_columns({arguments.key_column: "key"}), rows.count(), arguments.image_column
    names = storage.files(SUFFIXES)
    if not names:
        raise FileNotFoundError(f"{arguments.input} has no file that ends in {', '.join(SUFFIXES)} or .parquet.")
    blocks = math.ceil(len(names) / arguments.block_rows)
    return ray.data.from_items([{"key": name} for name in names], override_num_blocks=blocks), len(names), None


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    weights = weights_of(arguments)  # a wrong name is told here, not in an actor
    output = Storage(arguments.output)
    output.filesystem.create_dir(output.root, recursive=True)
    if output.files((".parquet",)):
        raise ValueError(f"{arguments.output} has Parquet files already, to which rows would be added; give an empty folder.")
    if not ray.is_initialized():
        if "RAY_ADDRESS" in os.environ:
            ray.init()
        else:
            size = arguments.object_store_mb and arguments.object_store_mb * 2**20
            cpus = arguments.num_cpus or max(2, len(os.sched_getaffinity(0)))
            ray.init(num_cpus=cpus, object_store_memory=size, include_dashboard=False, _node_ip_address="127.0.0.1")
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = 16 * 2**20
    actors = actors_of(arguments, ray.cluster_resources())
    rows, count, column = dataset(arguments)
    start = time.perf_counter()
    decoded = rows.map_batches(
        Decode(Preprocessing(weights.transforms()), arguments.input, column), batch_size=arguments.batch_size, num_cpus=1
    )
    # Ray starts an actor whose process died again, and does again what it was given. Where an actor has one core and no GPU,
    # Ray joins it with Decode, and decoded images aren't copied; else images are decoded in tasks while the actors compute.
    results = decoded.map_batches(
        Classify,
        fn_constructor_args=(arguments,),
        batch_size=arguments.batch_size,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=arguments.cpus_per_actor,
        num_gpus=0 if arguments.device == "cpu" else 1,
    )
    results.write_parquet(arguments.output)
    written, errors = summary(output)
    seconds = time.perf_counter() - start
    print(
        f"{written} rows for {count} images, {errors} of them unreadable, in {seconds:.1f} s ({written / seconds:.1f} images/s)"
    )
    if written != count:
        sys.exit(f"{count} images were found, but {written} rows written: delete {arguments.output} and run again.")


if __name__ == "__main__":
    main()
