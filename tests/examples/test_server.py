"""examples/server.py as a process, under load from a real client over loopback."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections import Counter
from pathlib import Path

import pytest
import torch
from support import small_classifier
from support.small_classifier import CLASSES
from support.tolerances import assert_as_good_as_stock

pytest.importorskip("fastapi", reason="FastAPI is not installed; pip install 'resnet_fused[serve]'")
aiohttp = pytest.importorskip("aiohttp", reason="aiohttp is not installed; pip install 'resnet_fused[test]'")
import server  # noqa: E402
from support.pictures import bomb, damaged, encoded, photograph, pictures  # noqa: E402
from support.serving import server_process  # noqa: E402
from support.waiting import wait_for  # noqa: E402

FILES = pictures()


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return small_classifier.options(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(options: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of each file by the stock model alone, in float32 and float64."""
    return small_classifier.alone(options, FILES)


@pytest.fixture(scope="module")
def address(options: list[str], tmp_path_factory: pytest.TempPathFactory):
    """A server for the tests that leave it as it is."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with server_process(log, *options, "--max-bytes", "1000000", "--deadline-ms", "60000") as (_, address):
        wait_for(lambda: asyncio.run(get(f"{address}/health/ready"))[0] == 200, "it is ready")
        assert "20 of 20 convolutions fused" in log.read_text()
        yield address


async def get(url: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.text()


async def post(address: str, bodies: list, at_a_time: int = 16) -> list[tuple[int, dict]]:
    """Status and JSON of an answer to each body, in their order."""
    places = asyncio.Semaphore(at_a_time)

    async def one(session: aiohttp.ClientSession, body) -> tuple[int, dict]:
        async with places, session.post(f"{address}/classify", params={"top": CLASSES}, data=body) as response:
            return response.status, await response.json()

    async with aiohttp.ClientSession() as session:
        return await asyncio.gather(*(one(session, body) for body in bodies))


def check(answers: list[tuple[int, dict]], numbers: list[int], alone: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Each answer is what the model says of that file alone."""
    stock, truth = alone
    for (status, answer), number in zip(answers, numbers, strict=True):
        assert status == 200, answer
        classes = answer["classes"]
        scores = torch.empty(CLASSES)
        scores[[entry["index"] for entry in classes]] = torch.tensor([entry["score"] for entry in classes])
        assert_as_good_as_stock(scores, stock[number], truth[number])
        assert classes[0]["index"] == stock[number].argmax()
        assert [entry["label"] for entry in classes] == [f"class {entry['index']}" for entry in classes]
        chances = torch.tensor([entry["probability"] for entry in classes])
        torch.testing.assert_close(chances, scores.softmax(0).sort(descending=True).values)


def metric(text: str, name: str) -> float:
    return next(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(f"{name} "))


def test_under_load_no_request_is_lost_and_none_answered_wrongly(address: str, alone):
    # So far apart are the two best classes of each file that rounding can't exchange them.
    best = alone[1].topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-4
    _, before = asyncio.run(get(f"{address}/metrics"))
    numbers = [i % len(FILES) for i in range(180)]
    check(asyncio.run(post(address, [FILES[i] for i in numbers])), numbers, alone)
    _, after = asyncio.run(get(f"{address}/metrics"))
    grown = lambda name: metric(after, name) - (metric(before, name) if f"\n{name} " in before else 0)  # noqa: E731
    assert grown('classify_requests_total{status="200"}') == len(numbers)
    assert grown("classify_batch_size_sum") == grown("classify_wait_seconds_count") == len(numbers)
    assert grown("classify_batch_size_count") < len(numbers), "no two images shared a batch"
    assert metric(after, "classify_in_flight") == metric(after, "classify_waiting") == 0


def test_bad_images_get_the_reason_and_those_beside_them_their_answer(address: str, alone):
    async def parts():
        """A body without a length in its header."""
        for _ in range(40):
            yield bytes(50_000)

    bad = [b"", b"hello", encoded(photograph("china"), "JPEG")[:5000], bytes(1_000_001), parts(), bomb()]
    numbers = list(range(len(FILES)))
    answers = asyncio.run(post(address, [*bad, *FILES]))
    check(answers[len(bad) :], numbers, alone)
    statuses, reasons = zip(*((status, answer["detail"]) for status, answer in answers[: len(bad)]), strict=True)
    assert statuses == (400, 400, 400, 413, 413, 413)
    for reason, part in zip(reasons, ("no bytes", "JPEG", "cut off", "1000000 bytes", "1000000 bytes", "bomb"), strict=True):
        assert part in reason


def test_whatever_is_sent_the_server_has_no_error(address: str):
    file = encoded(photograph("flower").resize((160, 107)), "JPEG")
    statuses = Counter(status for status, _ in asyncio.run(post(address, [damaged(file, seed) for seed in range(60)])))
    assert set(statuses) == {200, 400}, statuses
    assert asyncio.run(get(f"{address}/health/live"))[0] == 200


def test_when_stopped_it_answers_what_has_arrived(options: list[str], alone, tmp_path: Path):
    with server_process(tmp_path / "log.txt", *options, "--max-batch", "2", "--deadline-ms", "60000") as (process, address):
        wait_for(lambda: asyncio.run(get(f"{address}/health/ready"))[0] == 200, "it is ready")
        host, port = address.removeprefix("http://").split(":")

        async def stop_halfway() -> list[tuple[int, dict]]:
            # Some haven't sent all of their image when the signal comes; all in all they are too many for one batch.
            connections = []
            for file in FILES:
                reader, writer = await asyncio.open_connection(host, int(port))
                head = f"POST /classify?top={CLASSES} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(file)}\r\n\r\n"
                writer.write(head.encode() + file[: len(file) // 2])
                connections.append((reader, writer, file))
            while metric((await get(f"{address}/metrics"))[1], "classify_in_flight") < len(FILES):
                await asyncio.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            answers = []
            for _, writer, file in connections:
                writer.write(file[len(file) // 2 :])
            for reader, writer, _ in connections:
                head, _, body = (await asyncio.wait_for(reader.read(), 60)).partition(b"\r\n\r\n")
                answers.append((int(head.split()[1]), json.loads(body)))
                writer.close()
            return answers

        check(asyncio.run(stop_halfway()), list(range(len(FILES))), alone)
        assert process.wait(30) == 0, (tmp_path / "log.txt").read_text()
        with pytest.raises(ConnectionRefusedError), socket.create_connection((host, int(port))):
            pass


def test_a_model_that_cant_be_loaded_ends_the_server_with_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="see the log"):
            server.main(["--port", "0", "--checkpoint", str(tmp_path / "missing.pth")])
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert "No such file or directory" in caplog.text
