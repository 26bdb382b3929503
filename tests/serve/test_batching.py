"""The queue: what waits together is drawn together, a failure is one picture's own, and nobody draws for the gone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from PIL import Image

from instaflow.generate import Drawing
from instaflow.serve.batching import Batcher, Order, QueueFullError


def order(seed: int, size: int = 64) -> Order:
    return Order(prompt="sun", seed=seed, style=None, size=size, steps=1, guidance=1.0)


class Painter:
    """Remembers its batches; seed 13 is bad luck."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, orders: Sequence[Order]) -> list[Drawing]:
        self.batches.append([o.seed for o in orders])
        assert len({o.size for o in orders}) == 1
        if any(o.seed == 13 for o in orders):
            raise MemoryError("no room for 13")
        common = {"prompt": "sun", "model": "m", "steps": 1, "guidance": 1.0, "latency_ms": 1.0}
        return [Drawing(image=Image.new("RGB", (1, 1)), seed=o.seed, **common) for o in orders]


async def answers(batcher: Batcher, futures: list[asyncio.Future[Drawing]]) -> list[object]:
    worker = asyncio.create_task(batcher.run())
    found = await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 10)
    worker.cancel()
    return [f.seed if isinstance(f, Drawing) else type(f) for f in found]


def test_those_of_a_kind_go_together_and_the_rest_keep_their_order() -> None:
    async def go() -> list[object]:
        return await answers(batcher, batcher.submit([order(1), order(2, 128), order(3), order(4), order(5)]))

    painter = Painter()
    batcher = Batcher(painter, 3, 10)
    assert asyncio.run(go()) == [1, 2, 3, 4, 5]
    assert painter.batches == [[1, 3, 4], [2], [5]]


def test_a_failure_is_its_own_pictures_alone() -> None:
    async def go() -> list[object]:
        return await answers(batcher, batcher.submit([order(1), order(13), order(2)]))

    batcher = Batcher(Painter(), 16, 10)
    assert asyncio.run(go()) == [1, MemoryError, 2]


def test_the_queue_is_bounded_and_those_who_left_make_room_undrawn() -> None:
    async def go() -> list[object]:
        first = batcher.submit([order(1), order(2)])
        with pytest.raises(QueueFullError):
            batcher.submit([order(3), order(4)])
        assert batcher.waiting == 2
        first[0].cancel()
        return await answers(batcher, [first[1], *batcher.submit([order(5), order(6)])])

    painter = Painter()
    batcher = Batcher(painter, 16, 3)
    assert asyncio.run(go()) == [2, 5, 6]
    assert painter.batches == [[2, 5, 6]]
