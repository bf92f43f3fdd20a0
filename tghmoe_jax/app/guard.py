"""Who may talk to the server: names that it answers to, pages that may call it, users and their passwords.

A page of another site that is open in the same browser can send requests to this machine, and a name that points here
makes it look like one of ours. So the name that a browser asked for is checked, and where the request comes from.
"""

import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
import socket
import ssl
import stat
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from tghmoe_jax import untrusted
from tghmoe_jax.errors import UserError

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "cache-control": "no-store", "referrer-policy": "no-referrer", "x-content-type-options": "nosniff",
    "cross-origin-opener-policy": "same-origin", "cross-origin-resource-policy": "same-origin",
}  # fmt: skip
_HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([\w.-]+))(?::\d{1,5})?", re.ASCII)  # of a header: no path, no user
_LINK = ("GET", "navigate", "document")  # what a browser asks for where somebody follows a link
UNASKED = 20.0  # seconds in which a connection must have sent the head of a request
MOST_WRONG = 10  # passwords from one address in a minute


def read_users(path: Path) -> dict[str, bytes]:
    """{user: digest of the password} of a file with `name:password` a line. UserError where others may read it."""
    text = untrusted.read_bytes(path, 2**16)
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"--auth-file {path} may be read by others; run chmod 600 on it.")
    try:
        lines = [line.strip() for line in text.decode().splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"--auth-file {path} is not UTF-8 text; write name:password lines.") from None
    found = {}
    for number, line in enumerate(lines, 1):
        if line and not line.startswith("#"):
            name, colon, password = line.partition(":")
            if not (name and colon and password):
                raise UserError(f"--auth-file {path}: line {number} is not name:password; correct it.")
            found[name] = _digest(password)
    if not found:
        raise UserError(f"--auth-file {path} names nobody; write name:password lines.")
    return found


def _digest(password: str) -> bytes:
    return hashlib.sha256(password.encode()).digest()


class Guarded:
    """An ASGI application behind the checks. `names`: host names that the server answers to beside `localhost` and
    addresses; `users` as `read_users` gives them, None where everybody may come."""

    def __init__(
        self, app, names: Iterable[str] = (), users: dict[str, bytes] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self._app, self._users, self._clock = app, users, clock
        self._names = {"localhost", *(name.lower() for name in names)}
        self._wrong: dict[str, list[float]] = {}  # when, by address

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return

        async def secured(message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(raw=message["headers"]).update(HEADERS)
            await send(message)

        refused = self._refused(scope["method"], Headers(scope=scope), (scope.get("client") or ("",))[0])
        await (refused or self._app)(scope, receive, secured)

    def _refused(self, method: str, headers: Headers, address: str) -> PlainTextResponse | None:
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or not self._known(host):
            return PlainTextResponse("This server does not answer to that name; see its --name flag.", 421)
        own = (f"http://{host.lower()}", f"https://{host.lower()}")
        elsewhere = any(origin.lower() not in own for origin in headers.getlist("origin"))
        follows = (method, headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == _LINK
        if elsewhere or (headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and not follows):
            return PlainTextResponse("Requests of other pages are refused.", 403)
        if self._users is None:
            return None
        now = self._clock()
        wrong = [one for one in self._wrong.get(address, ()) if now - one <= 60]
        if len(wrong) >= MOST_WRONG:
            return PlainTextResponse("Too many wrong passwords; wait a minute.", 429)
        if self._may(headers.get("authorization", "")):
            return None
        if "authorization" in headers:
            self._wrong = {one: times for one, times in self._wrong.items() if now - times[-1] <= 60}
            self._wrong[address] = [*wrong, now]
        return PlainTextResponse("Name and password, please.", 401, {"www-authenticate": 'Basic realm="reading room"'})

    def _known(self, host: str) -> bool:
        """Whether it is an address, which no name server can point elsewhere, or one of the names."""
        if not (found := _HOST.fullmatch(host)):
            return False
        try:
            ipaddress.ip_address(found[1] or found[2])
        except ValueError:
            return host.lower().partition(":")[0] in self._names
        return True

    def _may(self, authorization: str) -> bool:
        scheme, _, coded = authorization.partition(" ")
        try:
            name, _, password = base64.b64decode(coded, validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            return False
        expected = self._users.get(name, b"")
        return scheme.lower() == "basic" and hmac.compare_digest(_digest(password), expected)


def certificate(cert: str, key: str) -> dict[str, str]:
    """What uvicorn takes of these PEM files. UserError where no server can speak https with them."""

    def asked() -> str:
        raise UserError(f"--tls {key} has a password; write the key without one, readable by you alone.")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=asked)
    except OSError as error:  # also an SSLError
        why = getattr(error, "reason", None) or error.strerror or "not PEM"
        raise UserError(f"--tls {cert} {key} cannot be used ({why}); name a certificate and its key in PEM.") from None
    return {"ssl_certfile": cert, "ssl_keyfile": key}


def own_names(more: Iterable[str] = ()) -> tuple[str, ...]:
    """Names that this machine gives itself, and `more`. No name server is asked: it is another host, and could name
    one of its own that leads here."""
    return (*more, socket.gethostname())


class Prompt(H11Protocol):
    """A connection that is closed where it sends no request: the server takes only so many at the same time."""

    _seen = None  # the request of the last look

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.loop.call_later(UNASKED, self._look)

    def _look(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is self._seen:
            self.transport.close()
        elif not self.transport.is_closing():
            self._seen = self.cycle
            self.loop.call_later(UNASKED, self._look)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there. UserError where another server does, or the machine has no such address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(128)
    except (OSError, OverflowError) as error:
        found.close()
        why = getattr(error, "strerror", None) or error
        raise UserError(f"--port {port} of {host} cannot be used ({why}); name another with --port.") from None
    return found
