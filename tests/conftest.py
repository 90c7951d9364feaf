"""What the API's and the client's tests share: a fake engine, a small tokenizer, and a server over both."""

import asyncio
import json
import socket
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest
import uvicorn
import uvloop

from onebase_adapters import errors
from onebase_adapters.formats.chat_template import read_chat_template
from onebase_adapters.store.adapter_store import AdapterStore
from onebase_engine.engine_info import AdapterInfo, EngineInfo, EngineStats, HeadInfo, TemplateInfo
from onebase_engine.request import EngineRequest, Output, TokenLogprobs
from onebase_engine.text.tokenizer import TextCodec, load_codec
from onebase_server.api.app import create_app
from onebase_server.api.services import ApiSettings, Services
from onebase_server.engine_process.engine_client import EngineUnavailableError
from onebase_server.jobs.job_store import JobBook
from onebase_server.jobs.runner import JobSettings
from support.tokenizer import save_tokenizer

pytest_plugins = ["support.fixtures"]

FAKE_TRAINER = (sys.executable, str(Path(__file__).parent / "support" / "fake_trainer.py"))
ADMIN_KEY = "admin-secret"
CONTEXT = 512


@pytest.fixture(scope="session")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    """A byte-level tokenizer of some 400 tokens, with a chat template, read back from its folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return load_codec(folder)


@dataclass(frozen=True)
class Reply:
    """What the fake engine generates for a request, before max_tokens cuts it."""

    tokens: Sequence[int]
    finish_reason: str = "stop"
    stop_token: int | None = 2
    error_kind: str | None = None


class FakeEngine:
    """Answers by a function of the request; by default with the prompt itself. Counts what is asked of it."""

    def __init__(self, vocab: int) -> None:
        self.info = EngineInfo(
            model="tiny",
            fingerprint="f00d",
            model_type="llama",
            quantization="nf4",
            device="cpu",
            vocab=vocab,
            context=CONTEXT,
            cache_tokens=4096,
            weight_bytes=1000,
            cache_bytes=2000,
            eos_token_ids=(2,),
            load_seconds={"loading weights": 0.1},
            width=3,
        )
        self.stats = EngineStats(*range(len(EngineStats.__struct_fields__)))
        self.ready = True
        self.reply: Callable[[EngineRequest], Reply] = lambda request: Reply(request.prompt)
        self.tokens_at_once = 1
        self.delay = 0.0
        self.raises: Exception | None = None
        self.requests: list[EngineRequest] = []
        self.aborted: list[str] = []
        self.ended: list[str] = []
        self.loaded: dict[str, str] = {}
        self.heads: dict[str, HeadInfo] = {}

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Output, None]:
        if not self.ready:
            raise EngineUnavailableError("The engine is starting.", retry_after=5)
        if self.raises is not None:
            raise self.raises
        self.requests.append(request)
        try:
            for output in self._outputs(request) if request.task == "generate" else self._read(request):
                await asyncio.sleep(self.delay)
                if output.finish_reason is not None:
                    self.ended.append(request.id)
                yield output
        finally:
            if request.id not in self.ended:
                self.aborted.append(request.id)

    def _outputs(self, request: EngineRequest) -> Iterator[Output]:
        reply = self.reply(request)
        if len(reply.tokens) >= request.sampling.max_tokens and reply.error_kind is None:
            reply = replace(reply, tokens=reply.tokens[: request.sampling.max_tokens], finish_reason="length")
            reply = replace(reply, stop_token=None)
        tokens = tuple(reply.tokens)
        pieces = [tokens[at : at + self.tokens_at_once] for at in range(0, len(tokens), self.tokens_at_once)]
        wanted = request.sampling.prompt_logprobs
        heads = None
        if wanted is not None:
            heads = (None, *(fake_logprobs(token, wanted) for token in request.prompt[1:]))
        for number, piece in enumerate(pieces or [()]):
            last = number >= len(pieces) - 1
            tops = request.sampling.logprobs
            yield Output(
                request.id,
                piece,
                () if tops is None else tuple(fake_logprobs(token, tops) for token in piece),
                prompt_logprobs=heads if number == 0 else None,
                cached_tokens=3 if number == 0 else 0,
                waited=0.25 if number == 0 else 0.0,
                finish_reason=reply.finish_reason if last else None,  # type: ignore[arg-type]
                stop_token=reply.stop_token if last and reply.finish_reason == "stop" else None,
                error="It broke." if last and reply.error_kind else None,
                error_kind=reply.error_kind if last else None,
            )

    def _read(self, request: EngineRequest) -> Iterator[Output]:
        """A classification's best label is the prompt's length, or each token, modulo the number of labels."""
        reply = self.reply(request)
        if reply.error_kind:
            yield Output(request.id, finish_reason="error", error="It broke.", error_kind=reply.error_kind)
            return
        if request.task == "embed":
            vector = (0.6, 0.8, float(len(request.prompt)))
            yield Output(request.id, embedding=vector, waited=0.25, finish_reason="stop")
            return
        head = next(self.heads[digest] for digest in request.loaded if digest in self.heads)
        count = len(head.labels)
        numbers = [len(request.prompt)] if head.kind == "sequence" else request.prompt
        rows = tuple(tuple(0.5 if at == n % count else 0.5 / (count - 1) for at in range(count)) for n in numbers)
        yield Output(request.id, probabilities=rows, finish_reason="stop")

    async def load_adapter(self, digest: str, folder: str) -> AdapterInfo:
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        if "refuse" in config:
            raise getattr(errors, config["refuse"])("The engine refuses this one.")
        self.loaded[digest] = folder
        virtual = config.get("virtual_tokens", 0)
        head = msgspec.convert(config.get("head"), HeadInfo | None)
        if head is not None:
            self.heads[digest] = head
        template = msgspec.convert(config.get("template"), TemplateInfo | None)
        chat = read_chat_template(Path(folder))
        return AdapterInfo("LORA", 8, 1000, 2000, ("LowRank x 2",), 2, virtual, head, template, chat_template=chat)

    async def unload_adapter(self, digest: str) -> None:
        self.loaded.pop(digest, None)


def fake_logprobs(token: int, top: int) -> TokenLogprobs:
    """The token itself is the most likely, then the ids after it; minus infinity comes up too."""
    best = tuple((token + i, -float("inf") if i == 3 else -0.5 - i) for i in range(top))
    return TokenLogprobs(token, -0.5, 1, best)


def make_adapter(folder: Path, weights: bytes = b"weights", **config: object) -> Path:
    """An adapter's folder as the fake engine takes it."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


@pytest.fixture
def admin_key() -> str:
    return ADMIN_KEY


@pytest.fixture
def new_adapter() -> Callable[..., Path]:
    return make_adapter


@pytest.fixture
def reply() -> type[Reply]:
    return Reply


@pytest.fixture
def engine(codec: TextCodec) -> FakeEngine:
    return FakeEngine(codec.tokenizer.get_vocab_size())


@pytest.fixture
def adapter_root(tmp_path: Path) -> Path:
    root = tmp_path / "adapters"
    root.mkdir()
    return root


@pytest.fixture
def services(engine: FakeEngine, codec: TextCodec, tmp_path: Path, adapter_root: Path) -> Iterator[Services]:
    """Services of an open server (no API key), with an admin key."""
    with closing(AdapterStore(tmp_path / "store")) as store, closing(JobBook(tmp_path / "jobs")) as book:
        settings = ApiSettings("tiny", adapter_root=adapter_root, admin_key=ADMIN_KEY)
        jobs = JobSettings("tiny", nice=1, command=FAKE_TRAINER)
        yield Services.over(engine, codec, store, settings, book=book, jobs=jobs)


@pytest.fixture
def live(services: Services) -> Iterator[str]:
    """The URL of a real server over `services`, in a thread of its own."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        config = uvicorn.Config(
            create_app(services), access_log=False, log_level="warning", http="httptools", lifespan="off"
        )
        server = uvicorn.Server(config)

        async def serve() -> None:
            await services.runner.start()
            await server.serve(sockets=[listener])
            await services.runner.stop()

        thread = threading.Thread(target=lambda: uvloop.run(serve()))
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        yield f"http://127.0.0.1:{port}"
        server.should_exit = True
        thread.join()
