"""Who may talk to the server: names that it answers to, pages that may call it, users and their passwords.

A page of another site that is open in the same browser can send requests to this machine, and a name that points here
makes it look like one of ours. So the name that a browser asked for is checked, and where the request comes from.
"""

import base64
import binascii
import collections
import hashlib
import hmac
import ipaddress
import socket
import stat
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

from tghmoe_jax import untrusted
from tghmoe_jax.errors import UserError

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "cache-control": "no-store", "referrer-policy": "no-referrer", "x-content-type-options": "nosniff",
    "cross-origin-opener-policy": "same-origin", "cross-origin-resource-policy": "same-origin",
}  # fmt: skip
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
        self._wrong: dict[str, collections.deque[float]] = collections.defaultdict(collections.deque)

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

        refused = self._refused(Headers(scope=scope), (scope.get("client") or ("",))[0])
        await (refused or self._app)(scope, receive, secured)

    def _refused(self, headers: Headers, address: str) -> PlainTextResponse | None:
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or not self._known(host):
            return PlainTextResponse("This server does not answer to that name; see its --name flag.", 421)
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "same-origin")
        navigates = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
        if (origin is not None and urlsplit(origin).netloc != host) or (
            site not in ("same-origin", "none") and not navigates
        ):
            return PlainTextResponse("Requests of other pages are refused.", 403)
        if self._users is None:
            return None
        wrong = self._wrong[address]
        while wrong and self._clock() - wrong[0] > 60:
            wrong.popleft()
        if len(wrong) >= MOST_WRONG:
            return PlainTextResponse("Too many wrong passwords; wait a minute.", 429)
        if self._may(headers.get("authorization", "")):
            return None
        if "authorization" in headers:
            wrong.append(self._clock())
        elif not wrong:
            del self._wrong[address]
        return PlainTextResponse("Name and password, please.", 401, {"www-authenticate": 'Basic realm="reading room"'})

    def _known(self, host: str) -> bool:
        """Whether it is an address, which no name server can point elsewhere, or one of the names."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._names
        return True

    def _may(self, authorization: str) -> bool:
        scheme, _, coded = authorization.partition(" ")
        try:
            name, _, password = base64.b64decode(coded, validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            return False
        expected = self._users.get(name, b"")
        return scheme.lower() == "basic" and hmac.compare_digest(_digest(password), expected)


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
