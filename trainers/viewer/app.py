"""The viewer's web application: the page, and what it asks for as JSON. It answers GET and nothing else, and writes nothing.

Answers are made in threads, a few at a time, so that memory is bounded however many ask. Credit, which takes long, is computed one
answer at a time beside the others. An answer that nobody waits for any more, as somebody types on, is not begun.
"""

from __future__ import annotations

import contextlib
import gzip
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from anyio import CapacityLimiter, move_on_after, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightning_rl.errors import LightningError
from trainers.viewer import page_files
from trainers.viewer.access import Access, Refusal, cookie_header, headers, new_nonce
from trainers.viewer.encoding import encoded
from trainers.viewer.library import Library, NotThere
from trainers.viewer.query import QueryError, episode_query
from trainers.viewer.records import Failure
from trainers.viewer.records import Runs as RunsAnswer
from trainers.viewer.runs import Runs

AT_ONCE = 4
"""Answers, one of credit besides."""
CREDIT = "run/{key}/credit"
CLOSING_S = 1.0
WORTH_PACKING = 1 << 13
"""Bytes."""
JSON = "application/json"
logger = logging.getLogger("lrl.ui")
Answer = Callable[[Request], Any]


def build_app(library: Library, access: Access, page: Path = page_files.FOLDER) -> ASGIApp:
    """`page`: the folder of the compiled page."""
    most, of_credit = CapacityLimiter(AT_ONCE), CapacityLimiter(1)
    routes = [
        Route(f"/api/{path}", _answering(answer, access, of_credit if path == CREDIT else most), methods=["GET"])
        for path, answer in Answers(library, Runs()).table().items()
    ]
    routes += [Route("/", _index(access, page), methods=["GET"])]
    routes += [Route(f"/{name}", _file(name, page), methods=["GET"]) for name in page_files.KINDS if "html" not in name]

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        with move_on_after(CLOSING_S):  # of what a thread still reads, no end is waited for
            await to_thread.run_sync(library.close, abandon_on_cancel=True)

    handlers = {Refusal: _refused, HTTPException: _no_address}
    return _Guarded(Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers), access)


class Answers:
    """What is said at each address; each may raise LightningError."""

    def __init__(self, library: Library, runs: Runs) -> None:
        self._library, self._runs = library, runs

    def table(self) -> Mapping[str, Answer]:
        return {
            "runs": self._list,
            "run/{key}": self._run,
            "run/{key}/episodes": self._episodes,
            "run/{key}/facets": self._facets,
            "run/{key}/episode": self._episode,
            "run/{key}/call": self._call,
            "run/{key}/experts": self._experts,
            "run/{key}/group": self._group,
            CREDIT: self._credit,
            "run/{key}/text": self._text,
        }

    def _list(self, http: Request) -> Any:
        shelf = self._library.shelf
        places = shelf.places()
        entries = [self._runs.entry(place) for place in places.values()]
        entries.sort(key=lambda entry: (entry.started_at, entry.key), reverse=True)
        return RunsAnswer(runs=entries, place=shelf.where, chosen=next(iter(places)) if shelf.named else None)

    def _run(self, http: Request) -> Any:
        return self._runs.detail(self._library.place(_key(http)))

    def _episodes(self, http: Request) -> Any:
        query = episode_query(http.query_params.multi_items())
        with self._library.reading(_key(http)) as book:
            return book.index.page(query)

    def _facets(self, http: Request) -> Any:
        with self._library.reading(_key(http)) as book:
            return book.index.facets()

    def _episode(self, http: Request) -> Any:
        from trainers.viewer.episode_view import episode_view

        with self._library.reading(_key(http)) as book:
            return episode_view(book.run, book.index, _wanted(http, "id"))

    def _call(self, http: Request) -> Any:
        from trainers.viewer.call_view import call_view

        with self._library.reading(_key(http)) as book:
            return call_view(book.run, _wanted(http, "id"))

    def _experts(self, http: Request) -> Any:
        from trainers.viewer.call_view import experts

        layer = _wanted(http, "layer")
        if not layer.isdecimal() or len(layer) > 6:
            raise QueryError(f"layer: {layer!r} is not a whole number")
        with self._library.reading(_key(http)) as book:
            return experts(book.run, _wanted(http, "id"), int(layer))

    def _group(self, http: Request) -> Any:
        from trainers.viewer.group_view import group_view

        with self._library.reading(_key(http)) as book:
            return group_view(book.run, book.index, _wanted(http, "name"))

    def _credit(self, http: Request) -> Any:
        from trainers.viewer.credit import group_credit

        with self._library.reading(_key(http)) as book:
            return group_credit(book.run, _wanted(http, "group"), http.query_params.getlist("rule"))

    def _text(self, http: Request) -> Any:
        from trainers.viewer.episode_view import whole_text

        with self._library.reading(_key(http)) as book:
            return whole_text(book.run, _wanted(http, "place"))


def _key(http: Request) -> str:
    return str(http.path_params["key"])


def _wanted(http: Request, name: str) -> str:
    value = http.query_params.get(name)
    if not value:
        raise QueryError(f"the address lacks {name}=")
    return value


def _answering(answer: Answer, access: Access, limiter: CapacityLimiter) -> Callable[[Request], Any]:
    async def endpoint(http: Request) -> Response:
        access.check_token(http)
        async with limiter:
            if await http.is_disconnected():
                return Response(status_code=204)
            return await to_thread.run_sync(_answered, answer, http, abandon_on_cancel=True)

    return endpoint


def _answered(answer: Answer, http: Request) -> Response:
    status, value = 200, None
    try:
        value = answer(http)
    except NotThere as error:
        status, value = 404, _failure(error)
    except LightningError as error:
        status, value = 400, _failure(error)
    except (Exception, SystemExit):
        logger.exception("%s", http.url.path)
        status, value = (
            500,
            Failure(error="the viewer failed at this", hint="what happened is in the terminal of `lrl ui`"),
        )
    return as_json(value, status, packed="gzip" in http.headers.get("accept-encoding", ""))


def _failure(error: LightningError) -> Failure:
    return Failure(error=str(error), hint=error.hint or "")


def as_json(value: Any, status: int = 200, *, packed: bool = False) -> Response:
    body = encoded(value)
    more = {"cache-control": "no-store", "vary": "accept-encoding"}
    if packed and len(body) >= WORTH_PACKING:
        body = gzip.compress(body, 1)
        more["content-encoding"] = "gzip"
    return Response(body, status, more, JSON)


def _index(access: Access, page: Path) -> Callable[[Request], Any]:
    async def endpoint(http: Request) -> Response:
        token = http.query_params.get("token")
        if token is not None:  # out of the address, and of the history, at once
            kept = cookie_header(access.cookie, token) if access.fits(token) else {}
            return Response(status_code=303, headers={"location": "./", "cache-control": "no-store", **kept})
        if not page_files.is_built(page):
            return Response(page_files.MISSING, 503, {"cache-control": "no-store"}, "text/plain; charset=utf-8")
        nonce = new_nonce()
        more = {"cache-control": "no-store", **headers(nonce)}
        return Response(page_files.index_with(nonce, page), 200, more, page_files.KINDS[page_files.INDEX])

    return endpoint


def _file(name: str, page: Path) -> Callable[[Request], Any]:
    async def endpoint(http: Request) -> Response:
        try:
            file = page_files.page_file(page, name)
        except OSError:
            return Response(page_files.MISSING, 404, {}, "text/plain; charset=utf-8")
        more = {"cache-control": "no-cache", "etag": file.tag, "vary": "accept-encoding"}
        if http.headers.get("if-none-match") == file.tag:
            return Response(status_code=304, headers=more)
        if "gzip" in http.headers.get("accept-encoding", ""):
            return Response(file.packed, 200, more | {"content-encoding": "gzip"}, page_files.KINDS[name])
        return Response(file.body, 200, more, page_files.KINDS[name])

    return endpoint


async def _refused(_: Request, refusal: Any) -> Response:
    answer = as_json(Failure(error=refusal.error, hint=refusal.hint), refusal.status)
    if refusal.status == 405:
        answer.headers["allow"] = "GET"
    return answer


async def _no_address(_: Request, error: Any) -> Response:
    return as_json(Failure(error="there is nothing at this address"), error.status_code)


class _Guarded:
    """Around everything: who may ask, which methods there are, and the headers of every answer, refusals among them."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *((k.encode(), v.encode()) for k, v in headers().items() if k.encode() not in present),
                ]
            await send(message)

        http = Request(scope, receive)
        try:
            if http.method != "GET":
                raise Refusal(405, "this viewer only answers GET", "it changes nothing")
            self._access.check_asker(http)
            await self._app(scope, receive, send_guarded)
        except Refusal as refusal:
            answer = await _refused(http, refusal)
            await answer(scope, receive, send_guarded)
