"""The chat-completions API of an actor: each sample of a harness has a door of its own, with a token.

    harness's process --HTTP, loopback--> thread of the server --Call--> Door --take--> the actor's loop
                     <--JSON or events---                      <------answer, refuse---

The server lives in a thread with its own event loop and does nothing but HTTP. The actor's loop takes the
calls when it comes by, and answers each, from its own thread. A client that leaves while its call is under
way leaves a call that `is_gone`. No connection outlives its call: those of thousands of samples would add up,
and one that is closed for being idle, just when its client uses it again, would fail a call.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler
from ray.util import get_node_ip_address

from actors.harness.chat import ApiError, ChatAnswer, ChatRequest, completion, events, request_of
from core.errors import AgroError

MODEL = "policy"
"""How the policy is called in the API, whatever name a request has."""
LOOPBACK = "127.0.0.1"
_ALL_ADDRESSES = ("0.0.0.0", "::")
_MAX_BYTES = 64 * 2**20
_BACKLOG = 1024
_PING_S = 10.0
_START_LIMIT_S = 30.0


@dataclass(eq=False)
class ChatCall:
    """A request of a harness, to be answered or refused once, from any thread."""

    request: ChatRequest
    is_gone: bool = False
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _future: asyncio.Future[ChatAnswer] = field(init=False)

    def __post_init__(self) -> None:
        self._future = self._loop.create_future()

    def answer(self, answer: ChatAnswer) -> None:
        """Sends the answer."""
        self._settle(lambda: self._future.set_result(answer))

    def refuse(self, error: ApiError) -> None:
        """Sends an error."""
        self._settle(lambda: self._future.set_exception(error))

    def _settle(self, settle: Callable[[], None]) -> None:
        def once() -> None:
            if not self._future.done():
                settle()

        with contextlib.suppress(RuntimeError):  # The server has been closed: nobody waits any more.
            self._loop.call_soon_threadsafe(once)


class Door:
    """A door is where the harness of one sample calls: an OpenAI client gets `base_url` and `api_key`."""

    def __init__(self, base_url: str, api_key: str) -> None:
        self.base_url, self.api_key = base_url, api_key
        self._lock = threading.Lock()
        self._calls: list[ChatCall] = []
        self._arrival: Future[None] = Future()

    @property
    def arrival(self) -> Future[None]:
        """Returns a future that is done once there is something to `take`."""
        return self._arrival

    def put(self, call: ChatCall) -> None:
        """Lets a call in; from the server's thread."""
        with self._lock:
            self._calls.append(call)
            if not self._arrival.done():
                self._arrival.set_result(None)

    def take(self) -> list[ChatCall]:
        """Returns the calls that came since the last time, in order, without those whose client has left."""
        with self._lock:
            calls, self._calls = self._calls, []
            if self._arrival.done():
                self._arrival = Future()
        return [call for call in calls if not call.is_gone]


class Endpoint:
    """The server of one actor. Example:

    with Endpoint() as endpoint:
        door = endpoint.open()
        door.arrival.result()
        for call in door.take(): call.answer(...)
        endpoint.shut(door)
    """

    def __init__(self, host: str = LOOPBACK) -> None:
        """Starts the server on a free port of the address `host`. Raises AgroError when it does not come
        up.
        """
        self._host = host
        self._doors: dict[str, Door] = {}
        self._loop = asyncio.new_event_loop()
        self._port = 0
        self._problem: BaseException | None = None
        self._is_up, self._closing = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._serve, name="harness-endpoint", daemon=True)
        self._thread.start()
        if not self._is_up.wait(_START_LIMIT_S) or self._problem is not None:
            raise AgroError(f"the endpoint for harnesses does not come up on {self._host}: {self._problem}")

    def open(self) -> Door:
        """Opens a door for one sample."""
        key = secrets.token_hex(8)
        door = Door(f"http://{self._shown_host}:{self._port}/{key}/v1", secrets.token_urlsafe(24))
        self._doors[key] = door
        return door

    def shut(self, door: Door) -> None:
        """Closes a door: its calls that nobody took are refused, and so are later ones."""
        self._doors.pop(door.base_url.split("/")[-2], None)
        for call in door.take():
            call.refuse(_over())

    def close(self) -> None:
        """Ends the server; open connections are cut."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join(_START_LIMIT_S)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def _shown_host(self) -> str:
        """Returns where a client reaches it: an address of this node where it listens at all of them."""
        host = get_node_ip_address() if self._host in _ALL_ADDRESSES else self._host
        return f"[{host}]" if ":" in host else host

    # --- in the server's thread ---

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._run())
        finally:
            self._loop.close()

    async def _run(self) -> None:
        app = web.Application(client_max_size=_MAX_BYTES, middlewares=[_once])
        app.router.add_post("/{key}/v1/chat/completions", self._chat)
        app.router.add_get("/{key}/v1/models", self._models)
        app.router.add_route("*", "/{rest:.*}", self._nothing_here)
        # Cancelled when its client leaves, which is how a call comes to be gone.
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        try:
            await runner.setup()
            # Beyond its backlog, clients that come at once try again after a second.
            site = web.TCPSite(runner, self._host, 0, backlog=_BACKLOG)
            await site.start()
            self._port = runner.addresses[0][1]
        except OSError as error:
            self._problem = error
            return
        finally:
            self._is_up.set()
        await self._closing.wait()
        await runner.cleanup()

    async def _models(self, request: web.Request) -> web.StreamResponse:
        try:
            self._admit(request)
        except ApiError as error:
            return _refused(error)
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "agro"}
        return web.json_response({"object": "list", "data": [model]})

    async def _nothing_here(self, request: web.Request) -> web.StreamResponse:
        return _refused(
            ApiError(
                404, f"{request.method} {request.path}: only /v1/chat/completions and /v1/models are here"
            )
        )

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        try:
            door = self._admit(request)
            call = ChatCall(request_of(await request.read()))
        except ApiError as error:
            return _refused(error)
        except web.HTTPRequestEntityTooLarge:
            return _refused(ApiError(413, f"the request is larger than {_MAX_BYTES >> 20} MiB"))
        door.put(call)
        try:
            return await self._answered(request, call)
        except (asyncio.CancelledError, ConnectionError):
            call.is_gone = True
            raise

    def _admit(self, request: web.Request) -> Door:
        """Returns the door that a request comes through. Raises ApiError for none, or without its token."""
        door = self._doors.get(request.match_info["key"])
        if door is None:
            raise _over()
        given = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if not secrets.compare_digest(given.encode(), door.api_key.encode()):
            raise ApiError(
                401, "the token is missing or wrong: use the client's api_key", code="invalid_api_key"
            )
        return door

    async def _answered(self, request: web.Request, call: ChatCall) -> web.StreamResponse:
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": MODEL}
        asked = call.request
        if not asked.is_stream:
            try:
                answer = await call._future
            except ApiError as error:
                return _refused(error)
            return web.json_response(completion(answer, head, has_logprobs=asked.has_logprobs))
        await asyncio.wait({call._future}, timeout=_PING_S)
        early = call._future.exception() if call._future.done() else None
        if isinstance(early, ApiError):
            return _refused(early)
        return await self._streamed(request, call, head)

    async def _streamed(
        self, request: web.Request, call: ChatCall, head: dict[str, Any]
    ) -> web.StreamResponse:
        """Sends the answer as events. Until it is there, comments keep the connection alive; then errors can
        only be events.
        """
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        response.force_close()
        await response.prepare(request)
        while not call._future.done():
            await response.write(b": the policy is at it\n\n")
            await asyncio.wait({call._future}, timeout=_PING_S)
        try:
            for event in events(call._future.result(), head, call.request):
                await response.write(_event(json.dumps(event)))
            await response.write(_event("[DONE]"))
        except ApiError as error:
            await response.write(_event(json.dumps(error.json)))
        await response.write_eof()
        return response


@web.middleware
async def _once(request: web.Request, handler: Handler) -> web.StreamResponse:
    response = await handler(request)
    response.force_close()
    return response


def _over() -> ApiError:
    return ApiError(404, "there is no such sample here, or it is over", code="sample_is_over")


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()


def _refused(error: ApiError) -> web.Response:
    return web.json_response(error.json, status=error.status)
