"""The endpoint over real HTTP, by the `openai` package: doors, tokens, streams, errors, leaving clients."""

from __future__ import annotations

import asyncio
import json
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from actors.harness.chat import ApiError, ChatAnswer
from actors.harness.endpoint import Door, Endpoint
from core.errors import AgroError

T = TypeVar("T")
HI: Any = [{"role": "user", "content": "hi"}]
FIVE = ChatAnswer("five", (), "stop", 7, 3)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as found:
        yield found


@pytest.fixture
def door(endpoint: Endpoint) -> Iterator[Door]:
    found = endpoint.open()
    yield found
    endpoint.shut(found)


def client(door: Door, **kwargs: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=door.base_url, api_key=door.api_key, max_retries=0, **kwargs)


def meanwhile(work: Callable[[], T], door: Door, answer: ChatAnswer | ApiError) -> T:
    """What `work`, in a thread, gets while its one call is answered."""
    with ThreadPoolExecutor(1) as pool:
        future: Future[T] = pool.submit(work)
        door.arrival.result(timeout=60)
        (call,) = door.take()
        if isinstance(answer, ApiError):
            call.refuse(answer)
        else:
            call.answer(answer)
        return future.result(timeout=60)


def test_a_call_is_answered(door):
    def work() -> Any:
        return client(door).chat.completions.create(model="any", messages=HI)

    found = meanwhile(work, door, FIVE)
    assert (found.choices[0].message.content, found.model, found.usage.total_tokens) == ("five", "policy", 10)
    assert door.take() == []
    assert not door.arrival.done()


def test_a_stream_comes_in_events(door):
    def work() -> list[Any]:
        return list(client(door).chat.completions.create(model="any", messages=HI, stream=True))

    chunks = meanwhile(work, door, FIVE)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "five"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_stream_that_waits_is_kept_alive_and_its_error_is_an_event(door, monkeypatch):
    monkeypatch.setattr("actors.harness.endpoint._PING_S", 0.05)
    body = {"messages": HI, "stream": True}
    headers = {"Authorization": f"Bearer {door.api_key}"}
    for answer in (FIVE, ApiError(503, "no")):
        with httpx.stream(
            "POST", f"{door.base_url}/chat/completions", json=body, headers=headers, timeout=60
        ) as response:
            lines = response.iter_lines()
            assert next(lines).startswith(": ")
            (call,) = door.take()
            call.answer(answer) if isinstance(answer, ChatAnswer) else call.refuse(answer)
            told = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert ("error" in told[0]) == isinstance(answer, ApiError)


def test_models_are_listed(door):
    assert [model.id for model in client(door).models.list()] == ["policy"]


def test_without_the_token_nothing_is_answered(endpoint, door):
    other = endpoint.open()
    for key in ("wrong", other.api_key):
        wrong = openai.OpenAI(base_url=door.base_url, api_key=key, max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="the token is missing or wrong"):
            wrong.chat.completions.create(model="any", messages=HI)
        with pytest.raises(openai.AuthenticationError):
            wrong.models.list()
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{door.base_url}/models")
    assert refused.value.code == 401


def test_it_listens_on_the_loopback_alone(door):
    assert door.base_url.startswith("http://127.0.0.1:")


def test_a_wrong_request_gets_openais_error(door):
    with pytest.raises(openai.BadRequestError, match="n = 2 is not supported") as refused:
        client(door).chat.completions.create(model="any", messages=HI, n=2)
    assert (refused.value.param, refused.value.code) == ("n", "unsupported")
    with pytest.raises(openai.NotFoundError, match="only /v1/chat/completions"):
        client(door).responses.create(model="any", input="hi")
    assert door.take() == []


def test_a_refused_call_is_its_error(door):
    def work() -> Any:
        with pytest.raises(openai.BadRequestError, match="no such message"):
            client(door).chat.completions.create(model="any", messages=HI)

    meanwhile(work, door, ApiError(400, "no such message"))


def test_a_door_that_is_shut_lets_nobody_in_and_refuses_who_waits(endpoint):
    door = endpoint.open()

    def work() -> None:
        with pytest.raises(openai.NotFoundError, match="it is over"):
            client(door).chat.completions.create(model="any", messages=HI)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        door.arrival.result(timeout=60)
        endpoint.shut(door)
        future.result(timeout=60)
    work()


def test_calls_of_a_client_that_left_are_gone(door):
    with pytest.raises(openai.APITimeoutError):
        client(door, timeout=2.0).chat.completions.create(model="any", messages=HI)
    deadline_s = time.monotonic() + 60
    (call,) = door._calls
    while not call.is_gone and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert door.take() == []
    call.answer(FIVE)  # Nobody hears it.


def test_calls_at_once_come_in_together(door):
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=door.base_url, api_key=door.api_key, max_retries=0) as found:
            calls = [found.chat.completions.create(model="any", messages=HI) for _ in range(20)]
            return list(await asyncio.gather(*calls))

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(asyncio.run, ask())
        answered = 0
        while answered < 20:
            door.arrival.result(timeout=60)
            for call in door.take():
                call.answer(FIVE)
                answered += 1
        assert len(future.result(timeout=60)) == 20


def test_a_closed_endpoint_leaves_no_thread_and_cuts_who_waits():
    endpoint = Endpoint()
    door = endpoint.open()

    def work() -> None:
        with pytest.raises(openai.APIConnectionError):
            client(door).chat.completions.create(model="any", messages=HI)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        door.arrival.result(timeout=60)
        (call,) = door.take()
        endpoint.close()
        future.result(timeout=60)
    assert not endpoint._thread.is_alive()
    call.answer(FIVE)


def _reaches(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2.0).close()
    except OSError:
        return False
    return True


def test_it_listens_at_the_loopback_alone_unless_told_otherwise():
    with Endpoint() as here, Endpoint("127.0.0.2") as elsewhere, Endpoint("0.0.0.0") as everywhere:
        ports = [urlsplit(found.open().base_url).port for found in (here, elsewhere, everywhere)]
        reached = [[_reaches(host, port) for host in ("127.0.0.1", "127.0.0.2")] for port in ports]
        assert reached == [[True, False], [False, True], [True, True]]
        assert urlsplit(everywhere.open().base_url).hostname not in ("0.0.0.0", None)


def test_an_address_that_is_not_this_nodes_is_told():
    with pytest.raises(AgroError, match=r"does not come up on 192\.0\.2\.1: "):
        Endpoint("192.0.2.1")
