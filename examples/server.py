"""A server that classifies images, to start from: dynamic batching, limits, deadlines, health, metrics, graceful stop.

pip install "resnet_fused[serve]"
python examples/server.py --help
python examples/server.py --model resnet50 --checkpoint weights.pth
curl --data-binary @cat.jpg http://127.0.0.1:8000/classify
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence

import uvicorn
from classifier import load
from serving.app import create_app
from serving.settings import parse


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves until SIGTERM or SIGINT; requests that have arrived by then are answered first."""
    settings = parse(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    failed = False

    def stop() -> None:
        nonlocal failed
        failed = server.should_exit = True

    server = uvicorn.Server(
        uvicorn.Config(
            create_app(settings, lambda: load(settings, settings.max_pixels), stop),
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=settings.access_log,
            # A little longer than any request may take.
            timeout_graceful_shutdown=int(settings.deadline_ms / 1000) + 5,
        )
    )
    # uvicorn raises the signal once more when it has stopped. It was asked to stop and did, so that is no error.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server.run()
    if failed:
        sys.exit("The model can't be served, see the log.")


if __name__ == "__main__":
    main()
