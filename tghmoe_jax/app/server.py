"""The web side of the room: the page, and answers to its requests: JSON, numbers of a slice, or a kept file."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tghmoe_jax import untrusted
from tghmoe_jax.app import kept, views
from tghmoe_jax.app.jobs import QueueFull
from tghmoe_jax.app.room import Room, check_idle
from tghmoe_jax.app.sessions import Session
from tghmoe_jax.app.uploads import SILENT, plainly, receive
from tghmoe_jax.errors import UserError, of_disk

_log = logging.getLogger(__name__)
STATIC = Path(__file__).with_name("static")
TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8",
         ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}  # fmt: skip
MOST_JSON = 2**16
UPLOADS = 4  # at the same time; others wait their turn, as many seconds as
PATIENCE = 60.0
ASKED = {"question": str, "choices": [str], "report": bool, "evidence": bool, "checkpoint": int,
         "min_accuracy": (float, None)}  # fmt: skip


class _Refused(Exception):
    """A sentence with its HTTP status."""

    def __init__(self, sentence: str, status: int):
        super().__init__(sentence)
        self.status = status


def web(room: Room) -> Starlette:
    """The application of a room."""
    uploads = asyncio.Semaphore(UPLOADS)
    pages = {f"/{path.name}": path for path in STATIC.iterdir() if path.suffix in TYPES}
    pages |= {"/": pages["/index.html"], "/niivue.js": STATIC / "niivue.js.gz"}

    async def page(request: Request) -> Response:
        path = pages[request.url.path]
        content = await run_in_threadpool(path.read_bytes)
        if path.suffix == ".gz":
            return Response(content, media_type=TYPES[".js"], headers={"content-encoding": "gzip"})
        return Response(content, media_type=TYPES[path.suffix])

    async def begin(request: Request) -> Response:
        session = room.sessions.new()
        return JSONResponse(room.facts() | {"token": session.token})

    async def end(request: Request, session: Session) -> Response:
        room.sessions.end(session)
        return JSONResponse({})

    async def upload(request: Request, session: Session) -> Response:
        session.limit(room.limits.minute, time.monotonic())
        length = request.headers.get("content-length", "")
        if not length.isdecimal():
            raise _Refused("the size of the files is not stated; send them with this page.", 411)
        check_idle(session)
        session.uploading, session.assume_hu = True, request.query_params.get("assume_hu") == "1"
        try:
            async with _turn(uploads):
                await run_in_threadpool(room.close_scan, session)
                await run_in_threadpool(room.check_room, int(length))
                await receive(request.stream(), int(length), session.folder, room.limits.bytes)
                if room.sessions.get(session.token) is None:
                    raise UserError("the page was closed.")
                session.uploading = False
                room.open_upload(session)
        except BaseException as error:
            session.close_scan()
            if isinstance(error, FileNotFoundError):  # the page was closed, and its folder with it
                raise UserError("the page was closed.") from None
            raise
        finally:
            session.uploading = False
        return JSONResponse(_state(room, session))

    async def choose(request: Request, session: Session) -> Response:
        session.limit(room.limits.minute, time.monotonic())
        room.open_choice(session, (await _json(request, {"number": int}))["number"])
        return JSONResponse(_state(room, session))

    async def example(request: Request, session: Session) -> Response:
        session.limit(room.limits.minute, time.monotonic())
        room.open_example(session, (await _json(request, {"number": int}))["number"])
        return JSONResponse(_state(room, session))

    async def ask(request: Request, session: Session) -> Response:
        session.limit(room.limits.minute, time.monotonic())
        room.ask(session, await _json(request, ASKED))
        return JSONResponse(_state(room, session))

    async def job(request: Request, session: Session) -> Response:
        return JSONResponse(_state(room, session))

    async def cancel(request: Request, session: Session) -> Response:
        if session.job:
            await run_in_threadpool(session.job.cancel)
        return JSONResponse(_state(room, session))

    async def close(request: Request, session: Session) -> Response:
        if session.uploading:
            check_idle(session)
        await run_in_threadpool(room.close_scan, session)
        return JSONResponse({})

    async def slice_(request: Request, session: Session) -> Response:
        def number(name: str) -> int:
            text = request.query_params.get(name, "")
            if not (text.isascii() and text.isdecimal() and len(text) < 8):
                raise UserError(f"{name} must be a whole number.")
            return int(text)

        axis, index = number("axis"), number("index")
        volume, scan = session.volume, session.scans.get(0)
        if volume is None or scan is None or axis > 2:
            raise UserError("no scan is open; open one first.")
        if "channel" in request.query_params:
            if (channel := number("channel")) > 2:
                raise UserError("there are three channels; ask for 0 to 2.")
            data, type = await run_in_threadpool(views.model_slice_of, scan, axis, index, channel)
        else:
            data, type = await run_in_threadpool(views.slice_of, volume, axis, index)
        return Response(data, media_type="application/octet-stream", headers={"x-type": type})

    async def volume(request: Request, session: Session) -> Response:
        if (found := session.volume) is None:
            raise UserError("no scan is open; open one first.")
        session.limit(room.limits.minute, time.monotonic())
        async with _turn(uploads):  # it takes as long
            length, parts = await run_in_threadpool(views.nifti_parts, found)
        return StreamingResponse(
            parts, media_type="application/octet-stream", headers={"content-length": str(length)}
        )  # fmt: skip

    async def keep(request: Request, session: Session) -> Response:
        form = request.query_params.get("form", "")
        if form not in kept.FORMS:
            raise UserError(f"answers are kept as {', '.join(kept.FORMS)}.")
        text = await run_in_threadpool(kept.FORMS[form][0], session.answers)
        headers = {"content-disposition": f'attachment; filename="answers.{form}"'}
        return Response(text, media_type=kept.FORMS[form][1], headers=headers)

    def told(endpoint: Callable) -> Callable:
        """The endpoint, whose errors become a sentence."""

        async def found(request: Request) -> Response:
            try:
                return await endpoint(request)
            except Exception as error:  # noqa: BLE001 - what is raised further is printed, with what it quotes
                return _said(error, room.folder)

        return found

    def of_session(endpoint: Callable) -> Callable:
        async def found(request: Request) -> Response:
            session = room.sessions.get(request.headers.get("x-session", ""))
            if session is None:
                raise _Refused("this page was open too long without use; reload it.", 404)
            return await endpoint(request, session)

        return told(found)

    routes = [Route(path, told(page)) for path in pages] + [Route("/api/session", told(begin), methods=["POST"])]
    for path, method, endpoint in (
        ("session", "DELETE", end), ("upload", "POST", upload), ("choose", "POST", choose),
        ("example", "POST", example), ("ask", "POST", ask), ("job", "GET", job), ("job", "DELETE", cancel),
        ("scan", "DELETE", close), ("slice", "GET", slice_), ("volume", "GET", volume), ("keep", "GET", keep),
    ):  # fmt: skip
        routes.append(Route(f"/api/{path}", of_session(endpoint), methods=[method]))
    found = Starlette(routes=routes)
    found.router.redirect_slashes = False  # it would send the browser to the name that it asked for
    return found


def _state(room: Room, session: Session) -> dict[str, Any]:
    """The session's job: its state and step, how many are before it, its result."""
    if (job := session.job) is None:
        return {"state": "none"}
    return {"state": job.state, "step": job.step, "place": job.place, "what": job.what,
            "result": job.result if job.state == "done" else None, "error": job.error}  # fmt: skip


@contextlib.asynccontextmanager
async def _turn(uploads: asyncio.Semaphore) -> AsyncIterator[None]:
    """Waits until few enough others send files."""
    try:
        await asyncio.wait_for(uploads.acquire(), PATIENCE)
    except TimeoutError:
        raise _Refused("too many others send files just now; send yours in a minute.", 503) from None
    try:
        yield
    finally:
        uploads.release()


async def _json(request: Request, kind: dict[str, Any]) -> dict[str, Any]:
    """The body of a request: an object with exactly these keys. UserError where it is something else."""
    try:
        body = await asyncio.wait_for(_body(request), SILENT)
    except TimeoutError:
        raise _Refused("the request was cut short on the way; send it again.", 408) from None
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or value.keys() != kind.keys() or untrusted.fault(value, kind):
        raise UserError("the request is not understood; use this page.")
    return value


async def _body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_JSON:
            raise _Refused("the request is too long; shorten the question.", 413)
    return body


def _said(error: Exception, folder: Path) -> Response:
    """One sentence for each error; what is not foreseen is named to the log by its type alone."""
    if isinstance(error, _Refused):
        return JSONResponse({"error": str(error)}, error.status)
    if isinstance(error, UserError):
        return JSONResponse({"error": plainly(error, folder)}, 503 if isinstance(error, QueueFull) else 400)
    if of_disk(error):
        return JSONResponse({"error": "the disk of the server is full or cannot be written; tell who runs it."}, 507)
    if not isinstance(error, ClientDisconnect):
        _log.error("a request failed with %s", type(error).__name__)
    return JSONResponse({"error": "something went wrong on the server; nothing of the request is kept."}, 500)
