"""Dynamic batching: requests that wait together are computed together, by one call of the model on a thread of its own."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class _Waiting(Generic[Item, Result]):
    item: Item
    since: float
    result: asyncio.Future[Result]


class Batcher(Generic[Item, Result]):
    """Collects items into batches. While a batch is computed the next one grows, so batches follow the load by themselves.

    All methods are called in the event loop. How many items wait is limited by the caller.

    Args:
        compute: gives the results of a list of items, in their order. It runs on `thread`, never twice at a time.
        thread: an executor of one thread.
        max_batch: the most items in one call.
        max_wait: seconds that an item may wait for others while the thread is idle.
        coming: whether others are on their way; while none is, nothing waits for them.
        observe: is told of each batch: its size, the seconds that each item waited, and the seconds that it took.
    """

    def __init__(
        self,
        compute: Callable[[list[Item]], Sequence[Result]],
        thread: ThreadPoolExecutor,
        *,
        max_batch: int,
        max_wait: float,
        coming: Callable[[], bool] = lambda: True,
        observe: Callable[[int, list[float], float], None] = lambda size, waits, seconds: None,
    ) -> None:
        self._compute, self._thread, self._coming, self._observe = compute, thread, coming, observe
        self._max_batch, self._max_wait = max_batch, max_wait
        self._waiting: deque[_Waiting[Item, Result]] = deque()
        self._changed = asyncio.Event()
        self._closing = False
        self._busy_since: float | None = None
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._serve())

    def __len__(self) -> int:
        """How many items wait for their batch."""
        return len(self._waiting)

    async def submit(self, item: Item) -> Result:
        """The result of one item. When the caller is cancelled before the item's batch begins, the item isn't computed."""
        if self._closing:
            raise RuntimeError("The batcher is closed and takes no more items.")
        waiting = _Waiting(item, self._loop.time(), self._loop.create_future())
        self._waiting.append(waiting)
        self._changed.set()
        return await waiting.result

    def stuck(self, seconds: float) -> bool:
        """Whether it will give no more results: a batch has taken longer than that, or the loop over batches has ended."""
        since = self._busy_since
        return self._task.done() or (since is not None and self._loop.time() - since > seconds)

    async def close(self) -> None:
        """Computes what waits, then ends."""
        self._closing = True
        self._changed.set()
        await self._task

    async def _serve(self) -> None:
        while batch := await self._next_batch():
            self._busy_since = start = self._loop.time()
            try:
                items = [waiting.item for waiting in batch]
                results = await self._loop.run_in_executor(self._thread, self._compute, items)
                for waiting, result in zip(batch, results, strict=True):
                    if not waiting.result.done():  # nobody waits for it any more
                        waiting.result.set_result(result)
            except Exception as error:
                for waiting in batch:
                    if not waiting.result.done():
                        waiting.result.set_exception(error)
            self._busy_since = None
            self._observe(len(batch), [start - waiting.since for waiting in batch], self._loop.time() - start)

    async def _next_batch(self) -> list[_Waiting[Item, Result]]:
        """The next items that somebody waits for; none when the batcher is closed and empty."""
        batch: list[_Waiting[Item, Result]] = []
        while not batch:
            while not self._waiting:
                if self._closing:
                    return []
                await self._change()
            until = self._waiting[0].since + self._max_wait
            while self._worth_waiting() and self._loop.time() < until:
                await self._change(until)
            while self._waiting and len(batch) < self._max_batch:
                waiting = self._waiting.popleft()
                if not waiting.result.done():
                    batch.append(waiting)
        return batch

    def _worth_waiting(self) -> bool:
        return 0 < len(self._waiting) < self._max_batch and not self._closing and self._coming()

    async def _change(self, until: float | None = None) -> None:
        """Returns when an item came, when the batcher is closing, or at that time of the loop's clock."""
        self._changed.clear()
        timer = None if until is None else self._loop.call_at(until, self._changed.set)
        await self._changed.wait()
        if timer is not None:
            timer.cancel()
