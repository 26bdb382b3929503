"""How `instaflow serve` bears load, on loopback; the clients share the processor with it.

python benchmarks/serving.py -o serving.json       start-up, load, overload, sameness
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

PORT = 8765
PROMPTS = ["a red apple", "cat face", "green frog", "sun", "a tree"]


@contextmanager
def served(*options: str, script: bool = True) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """A server in a process of its own, and the seconds from its start to its first picture."""
    command = [__file__, "--child", *options] if script else ["-m", "instaflow", "serve", *options]
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command])
    try:
        while True:
            try:
                request = urllib.request.Request(
                    f"http://127.0.0.1:{PORT}/v1/images/generations",
                    b'{"prompt": "sun", "seed": 1}',
                    {"Content-Type": "application/json"},
                )
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).read()
                break
            except OSError:
                time.sleep(0.02)
        yield process, time.perf_counter() - begun
    finally:
        process.terminate()
        process.wait()


def child(batch: int, queue: int) -> None:
    """Serve, so many pictures a batch."""
    import uvicorn

    from instaflow.generate import InstaFlow
    from instaflow.serve.app import create_app
    from instaflow.serve.orders import Limits

    flow = InstaFlow.load()
    flow.engine.batch = batch  # type: ignore[misc]
    uvicorn.run(create_app(flow, limits=Limits(queue=queue)), port=PORT, log_level="error")


async def ask(stream: tuple[asyncio.StreamReader, asyncio.StreamWriter], what: dict[str, Any]) -> tuple[int, bytes]:
    """One request on an open connection → status and body."""
    reader, writer = stream
    body = json.dumps(what).encode()
    head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(b"POST /v1/images/generations HTTP/1.1\r\n" + head.encode() + body)
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length"))
    return int(lines[0].split()[1]), await reader.readexactly(length)


async def load(clients: int, seconds: float) -> dict[str, Any]:
    """Clients that each ask again as soon as they are answered."""
    took: list[float] = []
    statuses: Counter[int] = Counter()
    until = time.perf_counter() + seconds

    async def one(number: int) -> None:
        stream = await asyncio.open_connection("127.0.0.1", PORT)
        rng = random.Random(number)
        while time.perf_counter() < until:
            begun = time.perf_counter()
            status, _ = await ask(stream, {"prompt": rng.choice(PROMPTS), "seed": rng.randrange(2**31)})
            statuses[status] += 1
            if status == 200:
                took.append(1000 * (time.perf_counter() - begun))
        stream[1].close()

    await asyncio.gather(*map(one, range(clients)))
    p50, p95, p99 = np.percentile(took, [50, 95, 99]).round(1)
    spread = {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99}
    return {"clients": clients, **spread, "pictures_s": round(len(took) / seconds, 1), "statuses": dict(statuses)}


async def sameness(count: int, clients: int) -> int:
    """Pictures of mixed sizes and seeds, asked for together, that are not what each is alone."""
    from instaflow.generate import InstaFlow

    rng = random.Random(0)
    asked = [(rng.choice(PROMPTS), rng.randrange(2**31), rng.choice([64, 64, 64, 32, 128])) for _ in range(count)]
    got: dict[int, bytes] = {}
    numbers = iter(range(count))

    async def one() -> None:
        stream = await asyncio.open_connection("127.0.0.1", PORT)
        for i in numbers:
            prompt, seed, size = asked[i]
            status = 429
            while status == 429:  # it waited too long
                status, body = await ask(stream, {"prompt": prompt, "seed": seed, "size": f"{size}x{size}"})
            assert status == 200, body
            got[i] = base64.b64decode(json.loads(body)["data"][0]["b64_json"])

    await asyncio.gather(*(one() for _ in range(clients)))
    flow = InstaFlow.load()
    return sum(got[i] != flow.generate(p, seed=s, size=z).png() for i, (p, s, z) in enumerate(asked))


def memory_mb(process: subprocess.Popen[bytes]) -> float:
    """Resident, now."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return round(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024, 0)


def main() -> None:
    """Measure, and write after every part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path, default=Path("serving.json"))
    parser.add_argument("--seconds", type=float, default=8, help="of load at each point")
    parser.add_argument("--overload-seconds", type=float, default=60)
    parser.add_argument("--child", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    report: dict[str, Any] = {"first_picture_s": []}

    def note(**found: Any) -> None:
        report.update(found)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
        print(found, flush=True)

    for _ in range(3):
        with served("--port", str(PORT), script=False) as (_, seconds):
            note(first_picture_s=[*report["first_picture_s"], round(seconds, 2)])
    for name, batch in (("singly", 1), ("batches", 16)):
        with served(str(batch), "128"):
            asyncio.run(load(64, 3))  # graphs are compiled
            note(**{name: [asyncio.run(load(clients, options.seconds)) for clients in (1, 8, 64)]})
    with served("16", "32") as (process, _):
        asyncio.run(load(16, 3))
        before = {"memory_mb": memory_mb(process), "load": asyncio.run(load(1, 3))}
        over = asyncio.run(load(320, options.overload_seconds))
        after = {"memory_mb": memory_mb(process), "load": asyncio.run(load(1, 3))}
        note(overload={"before": before, "during": over, "after": after})
    with served("16", "128"):
        note(different_of_1000=asyncio.run(sameness(1000, 48)))


if __name__ == "__main__":
    main()
