"""How long the server keeps others waiting while it reads the largest bodies that it takes.

    python -m benchmarks.long_bodies URL

Against a running server: GET /health again and again while each body is on its way, and how long the slowest took.
"""

import argparse
import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from typing import Any

_BYTES = 8_380_000
_WORDS = "the quick brown fox " * (_BYTES // 20)

BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "a text": ("/v1/completions", {"prompt": _WORDS}),
    "a chat's text": ("/v1/chat/completions", {"messages": [{"role": "user", "content": _WORDS}]}),
    "tokens": ("/v1/completions", {"prompt": [1234] * (_BYTES // 6)}),
    "prompts": ("/v1/embeddings", {"input": ["a b"] * (_BYTES // 7)}),
    "messages": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * (_BYTES // 36)}),
    "5,000 messages": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * 5000}),
    "text to count": ("/tokenize", {"prompt": _WORDS}),
    "text to name": ("/tokenize", {"prompt": _WORDS[: _BYTES // 8], "return_token_strs": True}),
    "tokens to read": ("/detokenize", {"tokens": [1234] * 1_000_000}),
    "a logit_bias": ("/v1/completions", {"prompt": "a", "logit_bias": {str(n): 1 for n in range(40_000)}}),
}


def send(url: str, path: str, body: bytes) -> None:
    """And read the answer, or the refusal."""
    request = urllib.request.Request(url + path, body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            answer.read()
    except urllib.error.HTTPError:
        pass


def health_beside(url: str, work: Callable[[], object]) -> list[float]:
    """Seconds that each GET /health took, in order of length."""
    thread = threading.Thread(target=work)
    thread.start()
    found = []
    while thread.is_alive():
        begun = time.perf_counter()
        connection = http.client.HTTPConnection(url.split("//")[1], timeout=300)
        connection.request("GET", "/health")
        connection.getresponse().read()
        connection.close()
        found.append(time.perf_counter() - begun)
        time.sleep(0.005)
    return sorted(found)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="e.g. http://127.0.0.1:8000")
    url = parser.parse_args().url.rstrip("/")
    idle = health_beside(url, lambda: time.sleep(2))
    print(f"{'idle':16} slowest /health {1e3 * idle[-1]:6.0f} ms")
    for name, (path, document) in BODIES.items():
        body = json.dumps(document).encode()
        begun = time.perf_counter()
        waits = health_beside(url, partial(send, url, path, body))
        took = time.perf_counter() - begun
        print(f"{name:16} slowest /health {1e3 * waits[-1]:6.0f} ms, {len(body) / 1e6:4.1f} MB in {took:.2f} s")


if __name__ == "__main__":
    main()
