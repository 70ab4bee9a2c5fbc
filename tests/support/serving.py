"""Servers for tests: examples/server.py as a process of its own, or its application on a thread of this one."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from classifier import Classifier
from serving.app import create_app

from support.waiting import wait_for

SERVER = Path(__file__).parents[2] / "examples" / "server.py"
SECONDS = 60


@contextmanager
def server_process(log: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The process and its address, as soon as it is alive. The system chooses the port."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RESNET_FUSED_SERVE_")}
    command = [sys.executable, SERVER, "--port", "0", *options]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    address = lambda: re.search(r"running on (http://[\d.:]+)", log.read_text())  # noqa: E731
    try:
        wait_for(lambda: address() or process.poll() is not None, "the server runs")
        assert process.poll() is None, log.read_text()
        yield process, address()[1]
    finally:
        process.kill()
        process.wait()


@contextmanager
def server_thread(settings: argparse.Namespace, load: Callable[[], Classifier]) -> Iterator[tuple[uvicorn.Server, str]]:
    """The server and its address. At the end it is stopped as by a signal."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        host, port = listening.getsockname()
        failed = lambda: setattr(server, "should_exit", True)  # noqa: E731
        server = uvicorn.Server(uvicorn.Config(create_app(settings, load, failed), log_config=None))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        thread.start()
        try:
            wait_for(lambda: server.started, "the server is alive")
            yield server, f"http://{host}:{port}"
        finally:
            server.should_exit = True
            thread.join(SECONDS)
            assert not thread.is_alive(), "the server doesn't stop"
