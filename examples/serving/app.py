"""The web application: one endpoint that classifies an image, health, metrics."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from classifier import BadImage, Classifier, TooManyPixels, probabilities
from fastapi import FastAPI, HTTPException, Query, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import ClientDisconnect

from serving.batching import Batcher
from serving.metrics import Metrics

# A batch that takes longer won't end any more: the server is dead. The first calls, which may take long on a GPU, are made
# before the server is ready.
STUCK_SECONDS = 60
# nginx's status for a client that went away before its answer; nobody receives it, the metrics count it.
CLIENT_CLOSED = 499
FILE = {"schema": {"type": "string", "format": "binary"}}
BODY = {"required": True, "content": {"image/jpeg": FILE, "image/png": FILE}}
ANSWERS: dict[int | str, dict[str, Any]] = {
    400: {"description": "No JPEG or PNG, or damaged"},
    408: {"description": "The image hadn't arrived by the deadline"},
    413: {"description": "Too many bytes or pixels"},
    500: {"description": "The server failed; its log says why"},
    503: {"description": "Not ready, or as many requests as the queue takes: try again after the seconds of Retry-After"},
    504: {"description": "No answer by the deadline"},
}
logger = logging.getLogger("server")


@dataclass
class _Progress:
    """How far a request has come, for the message when its time is up."""

    stage: str = "upload"


class Service:
    """Takes an image through the stages: admission, upload, decoding, batch, answer."""

    def __init__(self, settings: argparse.Namespace, load: Callable[[], Classifier], on_failure: Callable[[], None]) -> None:
        self.settings, self._load, self._on_failure = settings, load, on_failure
        self.in_flight = 0
        self.classifier: Classifier | None = None
        # The model is loaded and called on one thread, since OpenMP keeps a team of threads for each thread that calls it.
        self._model_thread = ThreadPoolExecutor(1, "model", initializer=torch.set_num_threads, initargs=(settings.threads,))
        self._decoders = ThreadPoolExecutor(settings.decode_threads, "decode")
        self.metrics = Metrics(lambda: self.in_flight, lambda: len(self.batcher), settings.max_batch)
        self.batcher: Batcher[np.ndarray, np.ndarray] = Batcher(
            lambda images: self._ready()(images),
            self._model_thread,
            max_batch=settings.max_batch,
            max_wait=settings.max_wait_ms / 1000,
            coming=lambda: self.in_flight > len(self.batcher),  # they are uploaded or decoded
            observe=self.metrics.batch,
        )

    async def start(self) -> None:
        """Loads the model and calls it with each size of a batch; then the server is ready."""

        def load() -> Classifier:
            classifier = self._load()
            image = np.zeros((*classifier.preprocessing.preset.crop_size * 2, 3), np.uint8)
            for size in range(1, self.settings.max_batch + 1):
                classifier([image] * size)
            return classifier

        try:
            self.classifier = await asyncio.get_running_loop().run_in_executor(self._model_thread, load)
        except Exception:
            logger.exception("The model can't be served.")
            self._on_failure()
            return
        text = self.classifier.describe()
        self.metrics.model.info({"name": self.settings.model, "fused": text})
        logger.info("Ready: %s, %s", self.settings.model, text)

    async def close(self) -> None:
        """Ends the threads, after what they still compute."""
        await self.batcher.close()
        self._decoders.shutdown()
        self._model_thread.shutdown()

    def _ready(self) -> Classifier:
        if self.classifier is None:
            raise HTTPException(503, "The model is being loaded; try again later.", {"Retry-After": "5"})
        return self.classifier

    async def classify(self, request: Request, top: int) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            HTTPException: there is none, with the status and the reason.
        """
        start = asyncio.get_running_loop().time()
        status = 500
        try:
            answer = await self._admitted(request, top)
            status = 200
            self.metrics.seconds["request"].observe(asyncio.get_running_loop().time() - start)
            return answer
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            self.metrics.requests.labels(status).inc()

    async def _admitted(self, request: Request, top: int) -> dict[str, Any]:
        classifier, settings = self._ready(), self.settings
        # Before a byte of the image is read, so that what is refused costs next to nothing.
        if self.in_flight >= settings.queue_limit:
            # By then those inside have their answers, or 504.
            after = str(max(1, math.ceil(settings.deadline_ms / 1000)))
            raise HTTPException(503, f"{self.in_flight} requests are being served; try again later.", {"Retry-After": after})
        self.in_flight += 1
        progress = _Progress()
        try:
            return await asyncio.wait_for(self._stages(classifier, request, top, progress), settings.deadline_ms / 1000)
        except asyncio.TimeoutError:
            if progress.stage == "upload":
                raise HTTPException(408, f"The image hadn't arrived within {settings.deadline_ms:g} ms.") from None
            raise HTTPException(504, f"No answer within {settings.deadline_ms:g} ms; it was at: {progress.stage}.") from None
        except ClientDisconnect:
            raise HTTPException(CLIENT_CLOSED, "The client went away.") from None
        except TooManyPixels as error:
            raise HTTPException(413, str(error)) from None
        except BadImage as error:
            raise HTTPException(400, str(error)) from None
        except HTTPException:
            raise
        except Exception:
            # Left to the framework it would close the connection, and with it the requests that follow on it.
            logger.exception("A request failed.")
            raise HTTPException(500, "The server failed at this image; its log says why.") from None
        finally:
            self.in_flight -= 1

    async def _stages(self, classifier: Classifier, request: Request, top: int, progress: _Progress) -> dict[str, Any]:
        data = await self._read(request)
        progress.stage = "decoding"
        loop = asyncio.get_running_loop()
        start = loop.time()
        image = await loop.run_in_executor(self._decoders, classifier.preprocessing.decode, data)
        self.metrics.seconds["decode"].observe(loop.time() - start)
        progress.stage = "the model"
        scores = await self.batcher.submit(image)
        if not np.isfinite(scores).all():
            raise HTTPException(500, "The model's scores of this image are not all finite numbers.")
        chances = probabilities(scores)
        return {
            "classes": [
                {"index": int(i), "label": classifier.labels[i], "score": float(scores[i]), "probability": float(chances[i])}
                for i in np.argsort(-scores, kind="stable")[:top]
            ]
        }

    async def _read(self, request: Request) -> bytes:
        """The body. As soon as it is longer than allowed it is an error; the length in the header may be missing."""
        limit = self.settings.max_bytes
        length = request.headers.get("content-length", "")
        data = bytearray()
        if not (length.isdecimal() and int(length) > limit):
            async for part in request.stream():
                data += part
                if len(data) > limit:
                    break
            else:
                return bytes(data)
        raise HTTPException(413, f"The image has more than {limit} bytes; send a smaller one.")


def create_app(
    settings: argparse.Namespace, load: Callable[[], Classifier], on_failure: Callable[[], None] = lambda: None
) -> FastAPI:
    """The application.

    Args:
        settings: see serving.settings.
        load: makes the classifier. Until it has returned the server is alive, but not ready.
        on_failure: is called when it raised; the reason is in the log by then.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = service = Service(settings, load, on_failure)
        starting = asyncio.create_task(service.start())
        yield
        # Here every request in flight has been answered.
        await starting
        await service.close()

    app = FastAPI(title="resnet_fused example server", lifespan=lifespan)

    @app.post("/classify", openapi_extra={"requestBody": BODY}, responses=ANSWERS)
    async def classify(request: Request, top: int = Query(5, ge=1, description="how many classes")) -> dict[str, Any]:
        """The classes with the highest scores, from the highest on. The body is the image file itself."""
        return await app.state.service.classify(request, top)

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        """200, unless the server must be started again."""
        if app.state.service.batcher.stuck(STUCK_SECONDS):
            raise HTTPException(503, "The model has stopped giving results.")
        return {"status": "alive"}

    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        """200 when the model is loaded and warm."""
        if app.state.service.classifier is None:
            raise HTTPException(503, "The model is being loaded.")
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(app.state.service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app
