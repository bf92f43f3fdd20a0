"""The reading room: a local page to look at a scan, ask, and see what the answer depends on (docs/app.md).

    python -m tghmoe_jax.app                                     the reader embedded in the package
    python -m tghmoe_jax.app --checkpoint runs/stage2 [--checkpoint runs/other] [--port 7860]
    python -m tghmoe_jax.app --host 0.0.0.0 --auth-file users.txt --tls cert.pem key.pem     for a group

It listens on this machine alone unless --host says otherwise, and asks no other host for anything. Exit codes: 2
something the user can fix (one sentence on stderr), 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

import argparse
import ipaddress
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the C++ logs of XLA would drown the address

from tghmoe_jax.errors import CommandParser, Stopped, UserError, command, run_command

PORT = 7860


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = CommandParser(
        prog="python -m tghmoe_jax.app", allow_abbrev=False, description=__doc__.split("\n")[0]
    )  # fmt: skip
    add = parser.add_argument
    add("--checkpoint", metavar="RUN", action="append", help="folder of a run; twice to compare two; default embedded")
    add("--port", type=int, default=PORT, help=f"default {PORT}; 0 takes a free one")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on; default this machine alone")
    add("--name", action="append", default=[], help="a host name that browsers use for this server, beside its address")
    add("--auth-file", type=Path, metavar="FILE", help="name:password lines, readable by this user only (chmod 600)")
    add("--tls", nargs=2, metavar=("CERT", "KEY"), help="PEM files, to serve https")
    add("--examples", metavar="FOLDER", help="scans to choose from, in addition to the phantoms")
    add("--most-mb", type=int, default=1024, metavar="N", help="most MiB of one upload; default 1024")
    add("--most-voxels", type=int, default=2**28, metavar="N", help="most voxels of one scan; default 2^28")
    add("--memory-mb", type=int, default=4096, metavar="N", help="MiB that all open scans may take; default 4096")
    add("--queue", type=int, default=40, metavar="N", help="requests that may wait; default 40")
    add("--minute", type=int, default=60, metavar="N", help="scans and questions of one page in a minute; default 60")
    add(
        "--allow-out-of-domain",
        action="store_true",
        help="allow reports and confidences of a model that saw no patient",
    )
    add("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    for name in ("most_mb", "most_voxels", "memory_mb", "queue", "minute"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be 1 or more.")
    try:
        alone = ipaddress.ip_address(args.host).is_loopback
    except ValueError:
        raise UserError(f"--host {args.host} is not an address, as 127.0.0.1 or 0.0.0.0 are.") from None
    if not alone and args.auth_file is None:
        raise UserError(f"--host {args.host} lets others in; add --auth-file with their names and passwords.")
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port {args.port} must lie between 0 and 65535.")
    if args.examples and not Path(args.examples).is_dir():
        raise UserError(f"--examples {args.examples} is no folder; name one that holds scans.")
    for file in args.tls or ():
        if not Path(file).is_file():
            raise UserError(f"--tls {file} is no file; name a certificate and its key in PEM.")
    return args


def run(args: argparse.Namespace) -> None:
    """Serves until a signal. UserError for what keeps it from beginning."""
    try:
        import uvicorn

        from tghmoe_jax.app import guard
    except ImportError as error:
        raise UserError(f"the package {error.name} is missing; run pip install '.[app]' in the clone.") from None
    users = args.auth_file and guard.read_users(args.auth_file)
    tls = guard.certificate(*args.tls) if args.tls else {}
    listener = guard.listening(args.host, args.port)
    # Until there is a folder to be emptied, a signal ends this process at once: raised in an import, it may be lost.
    heard = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    # Slow to import, so after what can be refused at once.
    from tghmoe_jax.app.examples import Examples
    from tghmoe_jax.app.folder import private_folder
    from tghmoe_jax.app.room import Limits, Room
    from tghmoe_jax.app.server import web
    from tghmoe_jax.reader.opening import load

    examples = Examples(args.examples)
    limits = Limits(args.most_mb * 2**20, args.most_voxels, args.memory_mb * 2**20, args.queue, args.minute)
    readers = [load(one) for one in args.checkpoint or ["embedded"]]
    for number, handler in heard.items():
        signal.signal(number, handler)
    with private_folder() as folder:
        room = Room(readers, folder, limits, examples, args.allow_out_of_domain)
        room.warm_up()
        config = uvicorn.Config(
            guard.Guarded(web(room), guard.own_names(args.name), users), http=guard.Prompt, ws="none", lifespan="off",
            log_config=None, access_log=False, server_header=False, proxy_headers=False, timeout_graceful_shutdown=2,
            limit_concurrency=256, **tls,
        )  # fmt: skip
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"The reading room is at {'https' if tls else 'http'}://{shown}:{port}/ (Ctrl-C ends it).", flush=True)
        stopped = Stopped(signal.SIGTERM)
        try:
            uvicorn.Server(config).run([listener])
        except Stopped as error:
            stopped = error
        finally:
            busy = room.close()
    if busy:  # the C++ of a model that still computes would abort the interpreter when it ends
        print(f"{stopped}.", file=sys.stderr, flush=True)
        os._exit(stopped.code)
    raise stopped


@command
def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code."""
    args = parse(argv)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("tghmoe_jax.app").setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # what it prints of an error may quote a request
    run(args)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
