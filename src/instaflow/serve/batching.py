"""Pictures that wait together are drawn together: a bounded queue before the one thread that draws."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from instaflow.generate import Drawing
from instaflow.models.request import Blend, Control
from instaflow.noise import Walk


class QueueFullError(Exception):
    """More pictures are waiting than the queue holds."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """One picture; those that differ in prompt and seed alone can be drawn together."""

    prompt: str | Blend
    seed: int | Walk
    style: str | None
    size: int
    steps: int
    guidance: float
    lora: tuple[float, ...] = ()
    """A scale for each of the model's LoRAs."""
    control: tuple[Control, ...] = ()

    @property
    def kind(self) -> tuple[object, ...]:
        """What must be the same in a batch."""
        return self.style, self.size, self.steps, self.guidance, self.lora, self.control


Draw = Callable[[Sequence[Order]], list[Drawing]]


@dataclass
class _Waiting:
    order: Order
    answer: asyncio.Future[Drawing]


@dataclass
class Batcher:
    """First come, first served; with the first go those of its kind, as many as are drawn together.

    Args:
        draw: orders of one kind → their drawings; it runs in a thread of its own, one call at a time.
        batch: most pictures a call.
        limit: most pictures that wait.
    """

    draw: Draw
    batch: int
    limit: int
    _queue: deque[_Waiting] = field(default_factory=deque)
    _more: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def waiting(self) -> int:
        """Pictures in the queue that somebody still waits for."""
        return sum(not w.answer.done() for w in self._queue)

    def submit(self, orders: Sequence[Order]) -> list[asyncio.Future[Drawing]]:
        """Queue all of them or none; a future that is cancelled leaves the queue.

        Raises:
            QueueFullError: there is no room for all.
        """
        self._queue = deque(w for w in self._queue if not w.answer.done())
        if len(self._queue) + len(orders) > self.limit:
            raise QueueFullError
        loop = asyncio.get_running_loop()
        added = [_Waiting(order, loop.create_future()) for order in orders]
        self._queue.extend(added)
        self._more.set()
        return [w.answer for w in added]

    async def run(self) -> None:
        """Draw until cancelled."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "draw") as thread:
            while True:
                await self._more.wait()
                if not (taken := self._take()):
                    self._more.clear()
                    continue
                answers = await loop.run_in_executor(thread, self._draw, [w.order for w in taken])
                for waiting, answer in zip(taken, answers, strict=True):
                    if waiting.answer.done():
                        continue
                    if isinstance(answer, Drawing):
                        waiting.answer.set_result(answer)
                    else:
                        waiting.answer.set_exception(answer)

    def _take(self) -> list[_Waiting]:
        """The first that is still wanted and others of its kind; the rest keep their order."""
        live = [w for w in self._queue if not w.answer.done()]
        taken = [w for w in live if w.order.kind == live[0].order.kind][: self.batch]
        chosen = {id(w) for w in taken}
        self._queue = deque(w for w in live if id(w) not in chosen)
        return taken

    def _draw(self, orders: Sequence[Order]) -> list[Drawing | Exception]:
        """A batch that fails is drawn one by one, so that the failure is its own picture's alone."""
        try:
            return [*self.draw(orders)]
        except Exception as error:
            if len(orders) == 1:
                return [error]
            return [answer for order in orders for answer in self._draw([order])]
