"""Load for a running server over HTTP with SSE, closed-loop or open-loop, and what its clients see.

    python -m benchmarks.load --url http://127.0.0.1:8000 --streams 16 --requests 64 --adapters 16
    python -m benchmarks.load --url http://127.0.0.1:8000 --rate 4 --requests 100 --adapters 64 --zipf 1.1

Closed loop: `--streams` clients, each sends its next request when the last one has ended. Open loop: requests come
at `--rate` a second (Poisson) whether the server keeps up or not. Prompts are random tokens, so nothing is found in
the prefix cache; lengths are N, or A-B for evenly drawn ones. The first of `--adapters` is the most popular one.
"""

import argparse
import asyncio
import json
import random
import time
import urllib.parse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import uvloop


@dataclass(frozen=True)
class Load:
    """What to send."""

    models: Sequence[str]
    """As the server calls them, the most popular first."""
    requests: int
    streams: int = 1
    """At once, closed-loop."""
    rate: float | None = None
    """Requests a second, open-loop; None: closed-loop."""
    zipf: float = 0.0
    """The k-th model's share goes with k^-zipf; 0: requests take the models in turn."""
    prompt_tokens: tuple[int, int] = (64, 64)
    output_tokens: tuple[int, int] = (64, 64)
    vocab: int = 10_000
    """Prompts are drawn from the tokens 100 to this."""
    seed: int = 0


@dataclass
class Report:
    """What came back. Times in seconds."""

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    """Time to the first token of each request."""
    gaps: list[float] = field(default_factory=list)
    """Between a stream's arrivals after that."""
    failures: Counter[str] = field(default_factory=Counter)
    """By HTTP status, or what happened to the connection."""

    @property
    def speed(self) -> float:
        """Output tokens a second, over the whole run."""
        return self.tokens / self.seconds

    def lines(self) -> list[str]:
        """For people."""
        done = len(self.first)
        found = [f"{done} requests, {self.tokens} tokens in {self.seconds:.2f} s: {self.speed:.0f} tokens/s"]
        for name, values in (("first token", self.first), ("between tokens", self.gaps)):
            if values:
                p50, p99 = percentile(values, 50), percentile(values, 99)
                found.append(f"{name:15} p50 {p50 * 1000:8.1f} ms   p99 {p99 * 1000:8.1f} ms")
        found += [f"failed: {count} x {what}" for what, count in self.failures.items()]
        return found


def percentile(values: Sequence[float], percent: int) -> float:
    """The nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


class _Client:
    """One keep-alive connection. Bare sockets: at a thousand events a second a real client's parsing would take
    a good part of the machine that is being measured."""

    def __init__(self, url: str, api_key: str | None) -> None:
        parts = urllib.parse.urlsplit(url)
        self._address = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._head = f"POST /v1/completions HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
        if api_key:
            self._head += f"authorization: Bearer {api_key}\r\n"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def run(self, body: bytes, report: Report) -> None:
        """Send one request and note what comes."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address)
        reader, writer = self._streams
        sent = time.perf_counter()
        writer.write(f"{self._head}content-length: {len(body)}\r\n\r\n".encode() + body)
        status = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1].decode()
        if status != "200":
            report.failures[status] += 1
            self.close()
            return
        last = sent
        tail = b""
        while not tail.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            block = await reader.read(1 << 16)
            if not block:
                report.failures["hung up"] += 1
                self.close()
                return
            now = time.perf_counter()
            if last == sent:
                report.first.append(now - sent)
            else:
                report.gaps.append(now - last)
            last = now
            tail = (tail + block)[-1000:]
        mark = tail.rfind(b'"completion_tokens":')
        report.tokens += int(tail[mark + 20 :].lstrip().split(b",")[0].split(b"}")[0])

    def close(self) -> None:
        """Hang up."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def _bodies(load: Load) -> list[bytes]:
    draw = random.Random(load.seed)
    weights = [(rank + 1) ** -load.zipf for rank in range(len(load.models))]
    found = []
    for number in range(load.requests):
        model = load.models[number % len(load.models)]
        if load.zipf:
            model = draw.choices(load.models, weights)[0]
        length = draw.randint(*load.prompt_tokens)
        body = {
            "model": model,
            "prompt": [draw.randrange(100, load.vocab) for _ in range(length)],
            "max_tokens": draw.randint(*load.output_tokens),
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        found.append(json.dumps(body).encode())
    return found


async def run_load(url: str, load: Load, api_key: str | None = None) -> Report:
    """Send it, all of it, and report."""
    bodies = _bodies(load)
    report = Report()
    started = time.perf_counter()
    if load.rate is None:
        queue = iter(bodies)  # shared: whoever is free takes the next

        async def stream() -> None:
            client = _Client(url, api_key)
            for body in queue:
                await client.run(body, report)
            client.close()

        await asyncio.gather(*(stream() for _ in range(load.streams)))
    else:
        idle: list[_Client] = []
        draw = random.Random(load.seed + 1)

        async def one(body: bytes) -> None:
            client = idle.pop() if idle else _Client(url, api_key)
            await client.run(body, report)
            idle.append(client)

        async with asyncio.TaskGroup() as group:
            for body in bodies:
                group.create_task(one(body))
                await asyncio.sleep(draw.expovariate(load.rate))
        for client in idle:
            client.close()
    report.seconds = time.perf_counter() - started
    return report


async def list_models(url: str, api_key: str | None = None) -> list[str]:
    """The server's models, the base first."""
    import httpx

    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    async with httpx.AsyncClient(headers=headers) as client:
        found = (await client.get(f"{url}/v1/models")).json()["data"]
    return [model["id"] for model in sorted(found, key=lambda model: model.get("parent") is not None)]


def _span(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    return int(first), int(last or first)


async def _main(arguments: argparse.Namespace) -> None:
    base, *adapters = await list_models(arguments.url, arguments.api_key)
    if len(adapters) < arguments.adapters:
        raise SystemExit(f"the server has {len(adapters)} adapters, {arguments.adapters} were asked for")
    load = Load(
        models=sorted(adapters)[: arguments.adapters] or [base],
        requests=arguments.requests or 4 * arguments.streams,
        streams=arguments.streams,
        rate=arguments.rate,
        zipf=arguments.zipf,
        prompt_tokens=arguments.prompt_tokens,
        output_tokens=arguments.output_tokens,
        vocab=arguments.vocab,
        seed=arguments.seed,
    )
    print("\n".join((await run_load(arguments.url, load, arguments.api_key)).lines()))


def main() -> None:
    """Run it once and print the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rate", type=float, help="requests a second, open-loop")
    parser.add_argument("--requests", type=int, help="default: four for each stream")
    parser.add_argument("--adapters", type=int, default=0, help="how many of the server's; 0: the base alone")
    parser.add_argument("--zipf", type=float, default=0.0, help="skew of the adapters' popularity")
    parser.add_argument("--prompt-tokens", type=_span, default=(64, 64), metavar="N|A-B")
    parser.add_argument("--output-tokens", type=_span, default=(64, 64), metavar="N|A-B")
    parser.add_argument("--vocab", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    uvloop.run(_main(parser.parse_args()))


if __name__ == "__main__":
    main()
