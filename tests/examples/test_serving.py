"""examples/serving with a model that waits as long as a test says: limits, deadlines, health, batching, settings."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
import torchvision
from torch import nn

pytest.importorskip("fastapi", reason="FastAPI is not installed; pip install 'resnet_fused[serve]'")
aiohttp = pytest.importorskip("aiohttp", reason="aiohttp is not installed; pip install 'resnet_fused[test]'")
from classifier import Classifier, Preprocessing  # noqa: E402
from PIL import Image  # noqa: E402
from serving import settings  # noqa: E402
from serving.batching import Batcher  # noqa: E402
from support.pictures import encoded  # noqa: E402
from support.serving import server_thread  # noqa: E402
from support.waiting import wait_for  # noqa: E402

FILE = encoded(Image.new("RGB", (40, 30), "red"), "PNG")
PREPROCESSING = Preprocessing(torchvision.models.ResNet18_Weights.DEFAULT.transforms())

LABELS = ["red", "green", "blue"]


class Gate(nn.Module):
    """Gives the mean of each channel of an image, but only while the gate is open; `calls` has the sizes of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.calls, self.error, self.scale = threading.Event(), [], None, 1.0
        self.open.set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(x))
        assert self.open.wait(60)
        if self.error is not None:
            raise self.error
        return x.mean((2, 3)) * self.scale


@contextmanager
def serving(gate: Gate, *options: str) -> Iterator[str]:
    """The address of a ready server of that model."""
    load = lambda: Classifier(gate, LABELS, PREPROCESSING, torch.float32, torch.device("cpu"))  # noqa: E731
    with server_thread(settings.parse(options, {}), load) as (_, address):
        wait_for(lambda: asyncio.run(get(f"{address}/health/ready"))[0] == 200, "it is ready")
        gate.calls.clear()
        try:
            yield address
        finally:
            gate.open.set()


async def get(url: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.text()


async def post(session: aiohttp.ClientSession, address: str, body=FILE) -> tuple[int, dict, dict]:
    """Status, headers and JSON."""
    async with session.post(f"{address}/classify", data=body) as response:
        kind = response.headers["content-type"]
        return response.status, dict(response.headers), await response.json() if "json" in kind else {}


async def until(address: str, line: str) -> None:
    """Returns when /metrics has that line."""
    end = time.monotonic() + 30
    while f"\n{line}\n" not in (await get(f"{address}/metrics"))[1]:
        assert time.monotonic() < end, f"the metrics never had {line}"
        await asyncio.sleep(0.01)


def test_more_requests_than_the_queue_takes_are_refused_at_once():
    gate = Gate()

    async def overload(address: str) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=100)) as session:
            gate.open.clear()
            inside = [asyncio.create_task(post(session, address)) for _ in range(5)]
            await until(address, "classify_in_flight 5.0")
            for status, headers, answer in await asyncio.gather(*(post(session, address) for _ in range(40))):
                assert status == 503
                assert headers["Retry-After"] == "30"
                assert "5 requests are being served" in answer["detail"]
            assert not any(task.done() for task in inside)
            gate.open.set()
            assert [status for status, _, _ in await asyncio.gather(*inside)] == [200] * 5
            assert (await post(session, address))[0] == 200

    with serving(gate, "--queue-limit", "5", "--deadline-ms", "30000") as address:
        asyncio.run(overload(address))


def test_the_deadline_ends_a_request_and_what_waits_is_not_computed():
    gate = Gate()

    async def late(address: str) -> None:
        async with aiohttp.ClientSession() as session:
            gate.open.clear()
            first = asyncio.create_task(post(session, address))
            await until(address, "classify_in_flight 1.0")
            answers = [await first, *await asyncio.gather(*(post(session, address) for _ in range(6)))]
            assert [status for status, _, _ in answers] == [504] * 7
            assert all("No answer within 400 ms; it was at: the model." in answer["detail"] for _, _, answer in answers)
            gate.open.set()
            status, _, answer = await post(session, address)
            assert (status, answer["classes"][0]["label"]) == (200, "red")
        # The first was being computed; of the six that waited none was.
        assert gate.calls == [1, 1]

    with serving(gate, "--deadline-ms", "400", "--max-batch", "4") as address:
        asyncio.run(late(address))


def test_an_image_that_doesnt_arrive_is_given_up():
    async def slow(address: str) -> bytes:
        host, port = address.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + FILE[:20])
        answer = await asyncio.wait_for(reader.readuntil(b"}"), 30)
        writer.close()
        return answer

    async def gone(address: str) -> None:
        host, port = address.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + FILE[:20])
        await until(address, "classify_in_flight 1.0")
        writer.close()
        await until(address, 'classify_requests_total{status="499"} 1.0')

    with serving(Gate(), "--deadline-ms", "1000") as address:
        answer = asyncio.run(slow(address))
        assert b" 408 " in answer
        assert b"hadn't arrived within 1000 ms" in answer
        asyncio.run(gone(address))
        assert "\nclassify_in_flight 0.0\n" in asyncio.run(get(f"{address}/metrics"))[1]


def test_a_failed_batch_is_an_error_and_the_next_one_an_answer():
    gate = Gate()

    async def fail(address: str) -> None:
        async with aiohttp.ClientSession() as session:
            gate.error = RuntimeError("out of memory")
            status, _, answer = await post(session, address)
            assert (status, answer["detail"]) == (500, "The server failed at this image; its log says why.")
            gate.error = None
            assert (await post(session, address))[0] == 200
            # NaN is no JSON.
            gate.scale = float("nan")
            status, _, answer = await post(session, address)
            assert (status, answer["detail"]) == (500, "The model's scores of this image are not all finite numbers.")

    with serving(gate) as address:
        asyncio.run(fail(address))
        assert asyncio.run(get(f"{address}/health/live"))[0] == 200


def test_while_the_model_is_loaded_the_server_is_alive_but_not_ready():
    loading = threading.Event()

    def load() -> Classifier:
        assert loading.wait(60)
        return Classifier(Gate(), LABELS, PREPROCESSING, torch.float32, torch.device("cpu"))

    async def refused(address: str) -> tuple[int, dict, dict]:
        async with aiohttp.ClientSession() as session:
            return await post(session, address)

    with server_thread(settings.parse([], {}), load) as (_, address):
        try:
            assert asyncio.run(get(f"{address}/health/live"))[0] == 200
            assert asyncio.run(get(f"{address}/health/ready"))[0] == 503
            status, headers, answer = asyncio.run(refused(address))
            assert (status, headers["Retry-After"], answer["detail"][:19]) == (503, "5", "The model is being ")
        finally:
            loading.set()
        wait_for(lambda: asyncio.run(get(f"{address}/health/ready"))[0] == 200, "it is ready")


def test_a_model_that_cant_be_loaded_stops_the_server():
    with server_thread(settings.parse([], {}), lambda: pytest.fail("no such model")) as (server, _):
        pass
    assert server.should_exit


def test_a_batch_that_never_ends_makes_the_server_dead(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("serving.app.STUCK_SECONDS", 0.2)
    gate = Gate()

    async def stuck(address: str) -> None:
        async with aiohttp.ClientSession() as session:
            gate.open.clear()
            task = asyncio.create_task(post(session, address))
            end = time.monotonic() + 30
            while (await get(f"{address}/health/live"))[0] != 503:
                assert time.monotonic() < end
                await asyncio.sleep(0.05)
            gate.open.set()
            assert (await task)[0] == 200
            assert (await get(f"{address}/health/live"))[0] == 200

    with serving(gate, "--deadline-ms", "60000") as address:
        asyncio.run(stuck(address))


def test_batches_grow_while_the_model_is_busy_and_keep_their_order():
    sizes: list[int] = []
    free = threading.Event()

    def compute(items: list[int]) -> list[int]:
        assert free.wait(60)
        sizes.append(len(items))
        return [item * item for item in items]

    async def run() -> None:
        batcher = Batcher(compute, thread, max_batch=4, max_wait=0)
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.sleep(0.05)  # it is being computed
        others = [asyncio.create_task(batcher.submit(i)) for i in range(1, 12)]
        await asyncio.sleep(0.05)
        assert len(batcher) == 11
        others.pop(2).cancel()  # 3
        free.set()
        assert await asyncio.gather(first, *others) == [i * i for i in range(12) if i != 3]
        await batcher.close()
        with pytest.raises(RuntimeError, match="closed"):
            await batcher.submit(1)

    with ThreadPoolExecutor(1) as thread:
        asyncio.run(run())
    assert sizes == [1, 4, 4, 2]


def test_an_idle_model_waits_a_little_for_more_and_no_longer():
    sizes: list[int] = []

    def compute(items: list[int]) -> list[int]:
        sizes.append(len(items))
        return items

    async def run() -> None:
        coming = True
        batcher = Batcher(compute, thread, max_batch=3, max_wait=0.5, coming=lambda: coming)
        loop = asyncio.get_running_loop()
        start = loop.time()
        # Three are a batch: none waits.
        await asyncio.gather(*(batcher.submit(i) for i in range(3)))
        assert loop.time() - start < 0.5
        start = loop.time()
        await asyncio.gather(*(batcher.submit(i) for i in range(2)))
        assert loop.time() - start >= 0.5
        # None is on its way: none is waited for.
        coming, start = False, loop.time()
        await batcher.submit(0)
        assert loop.time() - start < 0.5
        coming = True
        # When it is being closed there is nothing to wait for.
        start = loop.time()
        last = asyncio.create_task(batcher.submit(7))
        await asyncio.sleep(0)
        await batcher.close()
        assert await last == 7
        assert loop.time() - start < 0.5

    with ThreadPoolExecutor(1) as thread:
        asyncio.run(run())
    assert sizes == [3, 2, 1, 1]


def test_settings_come_from_options_and_environment():
    variables = {"RESNET_FUSED_SERVE_MAX_BATCH": "3", "RESNET_FUSED_SERVE_STOCK": "1", "RESNET_FUSED_SERVE_ACCESS_LOG": "0"}
    given = settings.parse(["--port", "0"], {**variables, "PATH": "/bin"})
    assert (given.max_batch, given.stock, given.access_log, given.port) == (3, True, False, 0)
    assert settings.parse(["--max-batch", "5"], variables).max_batch == 5


@pytest.mark.parametrize(
    "options, environment, why",
    [
        (["--queue-limit", "0"], {}, "is 0; it must be 1 or more"),
        (["--deadline-ms", "nan"], {}, "is nan; it must be a time"),
        ([], {"RESNET_FUSED_SERVE_MAX_BACH": "3"}, "no option --max-bach"),
        ([], {"RESNET_FUSED_SERVE_STOCK": "maybe"}, "it must be 1 or 0"),
    ],
    ids=["no_queue", "no_time", "misspelt_variable", "switch"],
)
def test_a_wrong_setting_says_what_is_right(options: list[str], environment: dict, why: str, capsys):
    with pytest.raises(SystemExit):
        settings.parse(options, environment)
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("text, cpus", [("max 100000", 8), ("150000 100000", 2), ("1600000 100000", 8), ("5000 100000", 1)])
def test_a_containers_quota_limits_the_threads(text: str, cpus: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8), raising=False)
    monkeypatch.setattr("pathlib.Path.exists", lambda path: True)
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: text)
    assert settings.usable_cpus() == cpus
