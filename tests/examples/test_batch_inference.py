"""Batch inference by Ray and by torchrun: every image is one row with stock's answer, whatever dies meanwhile."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from support import small_classifier
from support.pictures import bomb, pictures
from support.waiting import wait_for

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed; pip install 'resnet_fused[ray]'")
import pyarrow.dataset  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from classifier import BadImage  # noqa: E402
from offline import Storage  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = pictures()
IMAGES = 96
BAD = {"bad/bomb.png": bomb(), "bad/cut.JPG": FILES[0][:5000], "bad/empty.jpg": b"", "bad/text.png": b"hello"}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return small_classifier.options(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(options: list[str]) -> torch.Tensor:
    return small_classifier.alone(options, FILES)[0].softmax(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in folders, good ones and bad ones, and a file that is none."""
    root = tmp_path_factory.mktemp("images")
    for name, file in ({f"{i % 3}/{i:04d}.png": FILES[i % len(FILES)] for i in range(IMAGES)} | BAD).items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(file)
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with 24 rows in three row groups, as Hugging Face's datasets have images; a row has none."""
    path = tmp_path_factory.mktemp("parquet") / "images.parquet"
    images = [{"bytes": FILES[i % len(FILES)], "path": f"{i}.png"} for i in range(23)] + [None]
    pq.write_table(pa.table({"id": list(range(24)), "image": images, "other": ["x"] * 24}), path, row_group_size=8)
    return path


def check(output: Path, alone: torch.Tensor, keys: dict[str, int | None]) -> None:
    """Each key has one row: stock's answer to the file of that number, or an error where there is none."""
    table = pyarrow.dataset.dataset(output, exclude_invalid_files=True).to_table()
    rows = {row["key"]: row for row in table.to_pylist()}
    assert table.num_rows == len(rows) == len(keys)
    assert rows.keys() == keys.keys()
    for key, number in keys.items():
        row = rows[key]
        if number is None:
            assert row["error"]
            assert row["classes"] is row["labels"] is row["probabilities"] is None
            continue
        assert row["error"] is None
        best = alone[number].topk(3)
        assert row["classes"] == best.indices.tolist()
        assert row["labels"] == [f"class {i}" for i in row["classes"]]
        torch.testing.assert_close(torch.tensor(row["probabilities"]), best.values, rtol=1e-4, atol=1e-5)


def of_folder() -> dict[str, int | None]:
    return {f"{i % 3}/{i:04d}.png": i % len(FILES) for i in range(IMAGES)} | dict.fromkeys(BAD)


def of_parquet() -> dict[str, int | None]:
    return {str(i): i % len(FILES) for i in range(23)} | {"23": None}


def descendants(process: int) -> dict[int, str]:
    """Numbers and command lines of a process's children and theirs."""
    parents, lines = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                lines[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it has ended
    found, grown = {process}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in found} - found
        found, grown = found | more, bool(more)
    return {number: lines[number] for number in found - {process} if number in lines}


@contextmanager
def running(command: list[object], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """The process. At the end nothing is left of it and what it started."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
    try:
        yield process
    finally:
        for number in descendants(process.pid):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        process.kill()
        process.wait()


def parts(output: Path) -> list[Path]:
    return sorted(output.glob("*.parquet"))


# The actor that is the first to come to its fourth batch is killed before it can give the result.
KILLED = """
import os, signal
import batch_inference_ray
from batch_inference_ray import Classify, main

class Killed(Classify):
    calls = 0

    def __call__(self, batch):
        with open(os.path.join(notes, "actors"), "a") as file:
            file.write(f"{os.getpid()}\\n")
        result = super().__call__(batch)
        self.calls += 1
        if self.calls == 4 and not os.path.exists(os.path.join(notes, "killed")):
            with open(os.path.join(notes, "killed"), "w") as file:
                file.write(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return result

batch_inference_ray.Classify = Killed
"""


def test_ray_does_again_what_a_killed_actor_had(options, alone, folder, parquet, tmp_path):
    """Two actors, of which one is killed at work. Then Parquet, in the same cluster."""
    pytest.importorskip("ray", reason="Ray is not installed; pip install 'resnet_fused[ray]'")
    given = [*options, "--top", "3", "--batch-size", "4", "--num-cpus", "3", "--object-store-mb", "200"]
    first = [str(folder), str(tmp_path / "first"), "--block-rows", "4", *given, "--actors", "2"]
    second = [str(parquet), str(tmp_path / "second"), "--key-column", "id", *given, "--actors", "1"]
    # A third time into the same folder: results would be doubled.
    again = f"try:\n    main({second!r})\nexcept Exception as error:\n    print('refused:', error)\n"
    code = f"notes = {str(tmp_path)!r}\n{KILLED}\nmain({first!r})\nmain({second!r})\n{again}"
    # A short path, since those of Ray's sockets may have 107 characters.
    scratch, log = tempfile.mkdtemp(prefix="ray_"), tmp_path / "log.txt"
    path = os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "RAY_TMPDIR": scratch, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    try:
        with running([sys.executable, "-c", code], log, **environment) as process:
            assert process.wait(600) == 0, log.read_text()[-6000:]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    actors = (tmp_path / "actors").read_text().split()
    # Two, the one that took the place of the killed one, and one for Parquet.
    assert len(set(actors)) == 4
    assert actors.count((tmp_path / "killed").read_text()) == 4
    check(tmp_path / "first", alone, of_folder())
    check(tmp_path / "second", alone, of_parquet())
    assert "100 rows for 100 images, 4 of them unreadable" in log.read_text()
    assert "Progress" in log.read_text()
    assert "refused: " + str(tmp_path / "second") + " has Parquet files already" in log.read_text()


def torchrun(processes: int, *arguments: object) -> list[object]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*run, EXAMPLES / "batch_inference_torchrun.py", *arguments]


def test_torchrun_goes_on_where_a_killed_process_left_off(options, alone, folder, tmp_path):
    output, log = tmp_path / "results", tmp_path / "log.txt"
    given = [folder, output, *options, "--top", "3", "--batch-size", "4", "--chunk-rows", "4"]
    with running(torchrun(2, *given), log, OMP_NUM_THREADS="1") as process:
        wait_for(lambda: len(parts(output)) > 1, "two chunks are done", 300)
        worker = next(number for number, line in descendants(process.pid).items() if "batch_inference_torchrun.py" in line)
        os.kill(worker, signal.SIGKILL)
        assert process.wait(300) != 0
    before = {path: path.stat().st_mtime_ns for path in parts(output)}
    assert 1 < len(before) < 25
    with running(torchrun(1, *given), log, OMP_NUM_THREADS="1") as process:
        assert process.wait(300) == 0, log.read_text()[-6000:]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    check(output, alone, of_folder())
    assert f"100 rows in {output}, 4 of them unreadable; {len(before)} of 25 chunks were there" in log.read_text()


def test_torchrun_reads_parquet_and_refuses_results_of_another_run(options, alone, parquet, tmp_path, monkeypatch):
    import batch_inference_torchrun

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    for name, value in {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    given = [str(parquet), str(tmp_path), "--key-column", "id", *options, "--top", "3"]
    threads = torch.get_num_threads()
    try:
        batch_inference_torchrun.main([*given, "--batch-size", "3"])
        check(tmp_path, alone, of_parquet())
        with pytest.raises(ValueError, match="another run, which differs in: stock, top"):
            batch_inference_torchrun.main([*given, "--top", "4", "--stock"])
    finally:
        torch.set_num_threads(threads)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_a_folder_without_images_is_an_error(tmp_path):
    from batch_inference_torchrun import chunks_of

    with pytest.raises(FileNotFoundError, match=r"no file that ends in \.jpg, \.jpeg, \.png or \.parquet"):
        chunks_of(Storage(str(tmp_path)), 8)
    with pytest.raises(FileNotFoundError, match="missing"):
        chunks_of(Storage(str(tmp_path / "missing")), 8)


def test_a_file_that_cant_be_read_is_a_bad_image(tmp_path, monkeypatch):
    with pytest.raises(BadImage, match="can't be read.*No such file"):
        Storage(str(tmp_path)).read("removed.png")
    monkeypatch.setattr("offline.MAX_BYTES", 10)
    (tmp_path / "large.png").write_bytes(FILES[0])
    with pytest.raises(BadImage, match=f"has {len(FILES[0])} bytes; an image may have 10"):
        Storage(str(tmp_path)).read("large.png")


@pytest.mark.parametrize(
    "given, resources, actors",
    [
        ([], {"CPU": 2}, 1),
        ([], {"CPU": 16}, 14),
        (["--cpus-per-actor", "4"], {"CPU": 16}, 3),
        (["--device", "cuda"], {"CPU": 16, "GPU": 2}, 2),
        (["--actors", "2"], {"CPU": 3}, 2),
        (["--actors", "2"], {"CPU": 2}, None),
        (["--device", "cuda"], {"CPU": 16}, None),
    ],
    ids=["two_cores", "many", "large_actors", "gpus", "given", "too_many", "no_gpu"],
)
def test_actors_leave_a_core_for_decoding_or_it_is_an_error(given: list[str], resources: dict, actors: int | None):
    """With none left Ray would wait for ever."""
    pytest.importorskip("ray", reason="Ray is not installed; pip install 'resnet_fused[ray]'")
    from batch_inference_ray import actors_of, parser

    arguments = parser().parse_args(["in", "out", *given])
    if actors is None:
        with pytest.raises(ValueError, match=r"don't fit a cluster.*Lower --actors"):
            actors_of(arguments, resources)
    else:
        assert actors_of(arguments, resources) == actors
