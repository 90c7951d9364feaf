"""The SDK against a real server over a fake engine: both clients, every method, every error, every retry."""

import asyncio
import inspect
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import onebase_client
from onebase_client import (
    AdapterExistsError,
    AdapterPart,
    AdapterRefusedError,
    ApiError,
    AsyncOneBase,
    AuthenticationError,
    ConnectionFailedError,
    ContextLengthError,
    InvalidRequestError,
    NotFoundError,
    OneBase,
    OneBaseError,
    ProtocolError,
    QueueFullError,
    ServerError,
    StorageError,
    UnavailableError,
)
from onebase_engine.text.tokenizer import TextCodec
from onebase_server.engine_process.engine_client import EngineUnavailableError

USER = [{"role": "user", "content": "hi"}]
Make = Callable[..., Path]


@pytest.fixture
def client(live: str, admin_key: str) -> Iterator[OneBase]:
    with OneBase(live, admin_key=admin_key, max_retries=0) as opened:
        yield opened


def test_an_adapters_life(client: OneBase, adapter_root: Path, new_adapter: Make) -> None:
    folder = new_adapter(adapter_root / "a")
    (folder / "onebase.json").write_text('{"metrics": {"loss": 1.5}}')
    made = client.adapters.register("team/a", path="a")
    assert (made.id, made.status, made.info.rank, made.metrics) == ("team/a", "served", 8, {"loss": 1.5})
    assert client.adapters.list() == [client.adapters.get("team/a")]
    assert [(model.id, model.parent) for model in client.list_models()] == [("tiny", None), ("team/a", "tiny")]
    assert client.complete("abc", model="team/a").text == "abc"
    client.adapters.delete("team/a")
    assert client.adapters.list() == []
    with pytest.raises(NotFoundError):
        client.adapters.get("team/a")


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_the_url_may_be_the_one_that_openais_client_takes(live: str, end: str) -> None:
    with OneBase(live + end) as opened:
        assert opened.complete("abc").text == "abc"


def test_upload(client: OneBase, tmp_path: Path, new_adapter: Make, services: Any) -> None:
    folder = new_adapter(tmp_path / "a", bytes(range(256)) * 1000)
    (folder / "other.txt").write_text("not sent")
    made = client.adapters.register("a", upload=folder)
    assert made.source == "upload"
    stored = services.store.get("a").folder / "adapter_model.safetensors"
    assert stored.read_bytes() == bytes(range(256)) * 1000
    packed = tmp_path / "a.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    assert client.adapters.register("b", upload=str(packed)).digest == made.digest


def test_versions(client: OneBase, adapter_root: Path, tmp_path: Path, new_adapter: Make, engine: Any) -> None:
    for number in range(1, 4):
        new_adapter(adapter_root / str(number), bytes([number]))
    one = client.adapters.register("a", path="1")
    two = client.adapters.register("a", path="2", replace=True)
    three = client.adapters.add_version("a", upload=adapter_root / "3", promote=False)
    assert (two.version, two.current, three.version, three.current) == (2, True, 3, False)
    assert client.adapters.get("a@1").digest == one.digest
    client.complete("x", model="a@3")
    assert engine.requests[-1].adapter == three.digest
    assert client.adapters.promote("a", 3).version == 3
    assert client.adapters.rollback("a").version == 2
    client.adapters.delete("a@3")
    assert client.adapters.get("a").versions == [1, 2]
    assert client.adapters.register("a", upload=adapter_root / "3", replace=True).version == 4
    with pytest.raises(NotFoundError):
        client.adapters.promote("a", 3)


def test_what_is_wrong_before_anything_is_sent(client: OneBase, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefusedError, match=r"no adapter_config\.json"):
        client.adapters.register("a", upload=tmp_path)
    with pytest.raises(InvalidRequestError, match="either path"):
        client.adapters.register("a")
    with pytest.raises(InvalidRequestError, match="either path"):
        client.adapters.register("a", path="a", upload=tmp_path)


def test_complete(client: OneBase, engine: Any, codec: TextCodec) -> None:
    made = client.complete(
        "the é", max_tokens=50, temperature=0.5, stop=["zzz"], seed=3, logprobs=1, logit_bias={5: 1.0}, n=2
    )
    assert made.text == "the é"
    assert len(made.choices) == 2
    assert made.choices[0].logprobs is not None
    assert made.usage is not None
    assert made.usage.prompt_tokens == len(codec.encode("the é"))
    sampling = engine.requests[-2].sampling
    assert (sampling.temperature, sampling.seed, sampling.logit_bias) == (0.5, 3, {5: 1.0})
    assert client.complete(codec.encode("the"), max_tokens=50).text == "the"


def test_complete_stream(client: OneBase) -> None:
    *pieces, last = client.complete_stream("the é", max_tokens=50)
    assert "".join(piece.text for piece in pieces) == "the é"
    assert pieces[-1].choices[0].finish_reason == "stop"
    assert last.usage is not None
    assert last.text == ""


def test_chat(client: OneBase, engine: Any, reply: Any, codec: TextCodec) -> None:
    engine.reply = lambda request: reply(codec.encode("hello 漢字"))
    made = client.chat(USER, logprobs=True, top_logprobs=2)
    assert made.text == "hello 漢字"
    assert made.choices[0].logprobs is not None
    assert made.choices[0].logprobs.content is not None
    assert len(made.choices[0].logprobs.content[0].top_logprobs) == 2
    *pieces, last = client.chat_stream(USER)
    assert "".join(piece.text for piece in pieces) == "hello 漢字"
    assert last.usage == made.usage


def test_classify_and_embed(client: OneBase, adapter_root: Path, new_adapter: Make) -> None:
    for kind in ("sequence", "token"):
        new_adapter(adapter_root / kind, kind.encode(), head={"kind": kind, "labels": ["no", "yes"]})
        client.adapters.register(kind, path=kind)
    first, second = client.classify(["a", "bé"], model="sequence")
    assert {first.label, second.label} <= {"no", "yes"}
    assert first.probs is not None
    assert sum(first.probs) == 1
    (tagged,) = client.classify("the é", model="token")
    assert tagged.tokens is not None
    assert tagged.tokens[-1].end == 5
    assert [vector.embedding[:2] for vector in client.embed(["a", "b"])] == [[0.6, 0.8]] * 2
    with pytest.raises(InvalidRequestError, match="no classification head"):
        client.classify("a", model="tiny")


def test_leaving_a_stream_stops_the_server(client: OneBase, engine: Any, reply: Any) -> None:
    engine.reply = lambda request: reply([50] * 400)
    engine.delay = 0.01
    stream = client.chat_stream(USER)
    next(stream)
    stream.close()
    for _ in range(200):
        if engine.aborted:
            break
        time.sleep(0.01)
    assert engine.aborted
    assert not engine.ended


async def test_the_async_client(
    live: str, admin_key: str, adapter_root: Path, tmp_path: Path, new_adapter: Make
) -> None:
    new_adapter(adapter_root / "a")
    new_adapter(tmp_path / "b", b"other")
    async with AsyncOneBase(live, admin_key=admin_key) as client:
        made = await client.adapters.register("a", path="a")
        assert made == await client.adapters.get("a")
        await client.adapters.register("b", upload=tmp_path / "b")
        assert [adapter.id for adapter in await client.adapters.list()] == ["a", "b"]
        assert [model.id for model in await client.list_models()] == ["tiny", "a", "b"]
        assert (await client.complete("abc", model="a")).text == "abc"
        assert "".join([piece.text async for piece in client.complete_stream("the é", max_tokens=50)]) == "the é"
        answers = await asyncio.gather(*(client.chat([{"role": "user", "content": f"{i}"}]) for i in range(8)))
        assert all(answer.choices[0].finish_reason == "stop" for answer in answers)
        assert len(await client.embed(["a", "b"])) == 2
        with pytest.raises(InvalidRequestError):
            await client.classify("a", model="a")
        pieces = [piece async for piece in client.chat_stream(USER)]
        assert pieces[-1].usage is not None
        assert (await client.adapters.register("a", upload=tmp_path / "b", replace=True)).version == 2
        assert (await client.adapters.add_version("a", path="a")).version == 3
        assert (await client.adapters.promote("a", 1)).version == 1
        assert (await client.adapters.rollback("a")).version == 3
        await client.adapters.delete("b")
        with pytest.raises(NotFoundError):
            await client.adapters.get("b")
        with pytest.raises(NotFoundError):
            _ = [piece async for piece in client.complete_stream("a", model="b")]


def test_errors(client: OneBase, live: str, engine: Any, adapter_root: Path, new_adapter: Make) -> None:
    new_adapter(adapter_root / "a")
    new_adapter(adapter_root / "bad", refuse="AdapterMismatchError")
    client.adapters.register("a", path="a")
    with pytest.raises(NotFoundError, match="This server has: tiny, a") as missing:
        client.complete("a", model="nobody")
    assert (missing.value.status, missing.value.code, missing.value.param) == (404, "model_not_found", "model")
    assert missing.value.request_id
    with pytest.raises(AdapterExistsError):
        client.adapters.register("a", path="a")
    with pytest.raises(AdapterRefusedError) as refused:
        client.adapters.register("b", path="bad")
    assert refused.value.code == "invalid_adapter"
    with pytest.raises(ContextLengthError, match="512 tokens in all"):
        client.complete([5] * 600)
    with pytest.raises(InvalidRequestError) as invalid:
        client.complete("a", temperature=-1)
    assert invalid.value.param == "temperature"
    with OneBase(live) as stranger, pytest.raises(AuthenticationError):
        stranger.adapters.list()
    engine.raises = ZeroDivisionError()
    with pytest.raises(ServerError) as failed:
        client.complete("a")
    assert failed.value.status == 500
    with pytest.raises(ServerError):
        list(client.complete_stream("a"))


def test_an_error_in_a_stream(client: OneBase, engine: Any, reply: Any) -> None:
    engine.reply = lambda request: reply([50, 51], finish_reason="error", error_kind="engine_died")
    stream = client.complete_stream("a")
    assert next(stream).choices
    with pytest.raises(UnavailableError, match=r"It broke\.") as broken:
        next(stream)
    assert broken.value.status is None


def test_the_tree_is_one(client: OneBase) -> None:
    errors = [kind for kind in vars(onebase_client).values() if isinstance(kind, type)]
    errors = [kind for kind in errors if issubclass(kind, Exception)]
    assert len(errors) > 10
    assert all(issubclass(kind, OneBaseError) for kind in errors)
    assert sorted(onebase_client.__all__) == list(onebase_client.__all__)
    assert all(hasattr(onebase_client, name) for name in onebase_client.__all__)


def test_both_clients_have_the_same_methods() -> None:
    for one, other in [(OneBase, AsyncOneBase), (onebase_client.Adapters, onebase_client.AsyncAdapters)]:
        names = [name for name in vars(one) if not name.startswith("_")]
        assert names == [name for name in vars(other) if not name.startswith("_")]
        for name in names:
            assert str(inspect.signature(getattr(one, name)).parameters) == str(
                inspect.signature(getattr(other, name)).parameters
            )


def test_the_engines_restart_is_waited_for(live: str, engine: Any) -> None:
    original, calls = engine.generate, []

    async def generate(request: Any) -> Any:
        calls.append(request)
        if len(calls) < 3:
            raise EngineUnavailableError("The engine is starting.", retry_after=0)
        async for output in original(request):
            yield output

    engine.generate = generate
    with OneBase(live, max_retries=2) as client:
        assert client.complete("abc").text == "abc"
        assert len(calls) == 3
        calls.clear()
        assert "".join(piece.text for piece in client.complete_stream("abc")) == "abc"
        assert len(calls) == 3
        calls.clear()
    with OneBase(live, max_retries=1) as client, pytest.raises(UnavailableError) as gone:
        client.complete("abc")
    assert gone.value.retry_after == 0


class Script:
    """A transport that answers by a list: statuses with Retry-After, or failures of the connection."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def scripted(script: Script, retries: int = 2) -> OneBase:
    return OneBase("http://test/prefix/", max_retries=retries, transport=httpx.MockTransport(script))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The sleeps between tries, which do not happen."""
    found: list[float] = []
    monkeypatch.setattr("onebase_client.client.time.sleep", found.append)
    return found


MODELS = {"object": "list", "data": []}


def test_retry_after_is_honoured(waits: list[float]) -> None:
    script = Script(
        httpx.Response(429, headers={"retry-after": "7"}),
        httpx.Response(503, headers={"retry-after": "3.5"}),
        httpx.Response(200, json=MODELS),
    )
    with scripted(script) as client:
        assert client.list_models() == []
    assert waits == [7.0, 3.5]
    assert script.requests[0].url == "http://test/prefix/v1/models"


def test_waits_grow_where_the_server_names_none(waits: list[float]) -> None:
    script = Script(*[httpx.Response(503)] * 3, httpx.Response(200, json=MODELS))
    with scripted(script, 3) as client:
        client.list_models()
    assert 0.37 <= waits[0] <= 0.5
    assert 0.75 <= waits[1] <= 1.0
    assert 1.5 <= waits[2] <= 2.0


def test_what_is_not_tried_again(waits: list[float]) -> None:
    for answer, kind in [
        (httpx.Response(429, headers={"retry-after": "3600"}), QueueFullError),
        (httpx.Response(500), ServerError),
        (httpx.Response(507), StorageError),
        (httpx.Response(418, text="teapot"), ApiError),
    ]:
        with scripted(Script(answer)) as client, pytest.raises(kind):
            client.list_models()
    assert waits == []


def test_connections_that_fail(waits: list[float], tmp_path: Path, new_adapter: Make) -> None:
    script = Script(httpx.ConnectError("refused"), httpx.ReadError("broke"), httpx.Response(200, json=MODELS))
    with scripted(script) as client:
        client.list_models()
    with scripted(Script(*[httpx.ConnectError("refused")] * 3)) as client, pytest.raises(ConnectionFailedError):
        client.list_models()
    # Nobody knows whether it was done: not sent again.
    with scripted(Script(httpx.ReadError("broke"))) as client, pytest.raises(ConnectionFailedError):
        client.adapters.delete("a")
    # Never sent: sent again, the files from their beginning.
    script = Script(httpx.ConnectError("refused"), httpx.Response(409))
    with scripted(script) as client, pytest.raises(AdapterExistsError):
        client.adapters.register("a", upload=new_adapter(tmp_path / "a"))
    assert script.requests[0].content.count(b"weights") == script.requests[1].content.count(b"weights") == 1


def test_a_stream_that_breaks_off_is_an_error() -> None:
    events = 'data: {"id": "1", "created": 1, "model": "m", "choices": []}\n\n'
    with scripted(Script(httpx.Response(200, text=events))) as client:
        stream = client.complete_stream("a")
        assert next(stream).choices == []
        with pytest.raises(ConnectionFailedError, match="before its last event"):
            next(stream)


def test_something_else_that_answers(waits: list[float]) -> None:
    for answer in (httpx.Response(200, text="<html>"), httpx.Response(200, json={"data": [{}]})):
        with scripted(Script(answer)) as client, pytest.raises(ProtocolError):
            client.list_models()
    with scripted(Script(httpx.Response(200, text="data: x\n\n"))) as client, pytest.raises(ProtocolError):
        list(client.complete_stream("a"))


def test_nothing_listens() -> None:
    with OneBase("http://127.0.0.1:9", max_retries=0) as client, pytest.raises(ConnectionFailedError):
        client.list_models()


def test_several_adapters_at_once(client: OneBase, adapter_root: Path, new_adapter: Make, engine: Any) -> None:
    judge = {"head": {"kind": "sequence", "labels": ["no", "yes"]}}
    for name, config in {"a": {}, "b": {}, "judge": judge}.items():
        new_adapter(adapter_root / name, name.encode(), **config)
        client.adapters.register(name, path=name)
    parts: list[AdapterPart] = [{"name": "a", "weight": 0.5}, {"name": "b"}]
    assert client.complete("abc", adapters=parts).model == "0.5 a + b"
    assert [part.weight for part in engine.requests[-1].parts] == [0.5, 1.0]
    assert "".join(chunk.text for chunk in client.chat_stream(USER, adapters=parts, max_tokens=3))
    assert client.embed("abc", adapters=parts)[0].embedding
    assert client.classify("abc", adapters=[{"name": "judge"}, *parts])[0].label in ("no", "yes")
    with pytest.raises(NotFoundError) as caught:
        client.complete("abc", adapters=[{"name": "nobody"}])
    assert caught.value.param == "adapters[0].name"


async def test_several_adapters_at_once_awaited(
    live: str, admin_key: str, adapter_root: Path, new_adapter: Make, engine: Any
) -> None:
    new_adapter(adapter_root / "a")
    async with AsyncOneBase(live, admin_key=admin_key) as client:
        await client.adapters.register("a", path="a")
        await client.embed("abc", adapters=[{"name": "a", "weight": 2}])
        assert engine.requests[-1].parts[0].weight == 2
