"""Load on examples/server.py, fused and on stock PyTorch: throughput and latency, in a table.

python benchmarks/serving.py --model resnet50 --clients 1 8 --seconds 4 --rounds 3

Both servers run all the time; rounds of load go to them in turn (A B A B), so that what the machine does meanwhile meets both.
Each client sends its next image when it has the answer to its last one. Clients and servers share this machine's cores. Before
a time is taken, the answers of both to every image are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import numpy as np
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images

from resnet_fused.bench.inference import machine

SERVER = Path(__file__).parents[1] / "examples" / "server.py"


def photographs() -> list[bytes]:
    """Sixteen JPEG files of 60 to 100 KB, 500 × 375 pixels as in ImageNet: cuts of two photographs."""
    files = []
    for picture in load_sample_images().images:
        for i in range(8):
            file = io.BytesIO()
            Image.fromarray(picture).crop((20 * i, 7 * i, 20 * i + 500, 7 * i + 375)).save(file, "JPEG", quality=90)
            files.append(file.getvalue())
    return files


@contextmanager
def server(log: Path, *options: str) -> Iterator[str]:
    """The address of a server that is ready."""
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, SERVER, "--port", "0", *options], stdout=output, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 60
        while "Ready:" not in log.read_text():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server doesn't get ready:\n{log.read_text()}")
            time.sleep(0.1)
        yield re.search(r"running on (http://[\d.:]+)", log.read_text())[1]
    finally:
        process.terminate()
        process.wait()


async def scores(address: str, files: list[bytes]) -> np.ndarray:
    """What a server says of each file, [files, classes]."""
    rows = []
    async with aiohttp.ClientSession() as session:
        for file in files:
            async with session.post(f"{address}/classify?top=1000", data=file) as response:
                classes = sorted((await response.json())["classes"], key=lambda entry: entry["index"])
                rows.append([entry["score"] for entry in classes])
    return np.array(rows)


async def load(address: str, files: list[bytes], clients: int, seconds: float) -> tuple[list[float], float]:
    """Seconds that each answer took, and those that all took together. An answer that isn't 200 is an error."""
    taken: list[float] = []
    start = time.perf_counter()

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        while time.perf_counter() < start + seconds:
            sent = time.perf_counter()
            async with session.post(f"{address}/classify", data=files[(number + len(taken)) % len(files)]) as response:
                await response.read()
                response.raise_for_status()
            taken.append(time.perf_counter() - sent)

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(client(session, number) for number in range(clients)))
    return taken, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50", help="a classifier of torchvision.models (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8], help="how many clients at a time (default: 1 8)")
    parser.add_argument("--seconds", type=float, default=4, help="length of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds for each server (default: %(default)s)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    files = photographs()
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pth"
        torch.save(torchvision.models.get_model(arguments.model).state_dict(), weights)
        options = ["--model", arguments.model, "--checkpoint", str(weights), "--dtype", arguments.dtype]
        options += ["--device", arguments.device, "--deadline-ms", "60000"]
        with (
            server(Path(folder) / "fused.txt", *options) as fused,
            server(Path(folder) / "stock.txt", *options, "--stock") as stock,
        ):
            ours, theirs = asyncio.run(scores(fused, files)), asyncio.run(scores(stock, files))
            error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
            allowed = 1e-4 if arguments.dtype == "float32" else 5e-2
            if not error < allowed:
                raise SystemExit(f"The servers' answers differ by {error:.1e}, and {allowed:.1e} is allowed; no time is taken.")
            print(f"{machine(arguments.device)['cpu']}, PyTorch {torch.__version__};", end=" ")
            print(f"answers differ by {error:.1e} (relative norm)\n")
            print("| model | dtype | clients | server | images/s | p50, ms | p99, ms |\n|---|---|---|---|---|---|---|")
            for clients in arguments.clients:
                results: dict[str, list[tuple[list[float], float]]] = {stock: [], fused: []}
                for _ in range(arguments.rounds):
                    for address, rounds in results.items():
                        asyncio.run(load(address, files, clients, 0.5))  # so that its threads and caches are warm
                        rounds.append(asyncio.run(load(address, files, clients, arguments.seconds)))
                for name, address in (("stock", stock), ("fused", fused)):
                    rate = np.median([len(taken) / seconds for taken, seconds in results[address]])
                    median, tail = np.percentile([t for taken, _ in results[address] for t in taken], [50, 99]) * 1e3
                    row = (arguments.model, arguments.dtype, clients, name, f"{rate:.1f}", f"{median:.1f}", f"{tail:.1f}")
                    print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
