"""A room that is served in this process, its reader in place of a model one that repeats the question."""

import contextlib
import threading
from types import SimpleNamespace

import uvicorn

from tghmoe_jax.app import guard
from tghmoe_jax.app.folder import private_folder
from tghmoe_jax.app.room import Limits, Room
from tghmoe_jax.app.server import web
from tghmoe_jax.reader.answer import Answer

LIMITS = Limits()
DATA = {"slices": 8, "size": 32, "channels": "windows3"}


class Echo:
    """A reader whose answer is the question and the mean of the scan; `steps` are told to `watch`, `gate` holds it."""

    tasks, checkpoint = ("vqa",), {"name": "echo", "digest": "0", "step": 0}
    run = SimpleNamespace(config={"data": DATA}, name="echo")

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def reading(self):
        return DATA, None

    def spacing_fault(self, scan, name):
        return ""

    def check(self, asked, task, new_tokens):
        pass

    def watch(self, step):
        pass

    def forget(self):
        pass

    def ask(self, scan, question, choices=(), **options):
        self.watch("encode")
        self.entered.set()
        assert self.gate.wait(60)
        self.watch("decode")
        checkpoint = {"name": "echo", "digest": "0"}
        mean = float(scan.volume.array.mean())
        return Answer(f"{question} {mean:.3f}", 0, "vqa", checkpoint=checkpoint, scan=scan, blind_text="no")


@contextlib.contextmanager
def served(parent, limits=LIMITS, readers=None, examples=None, **guarded):
    """A room and its port; the private folder lies in `parent`."""
    listener = guard.listening("127.0.0.1", 0)
    with private_folder(parent) as folder:
        room = Room(readers or [Echo()], folder, limits, examples)
        app = guard.Guarded(web(room), **guarded)
        config = uvicorn.Config(
            app, http=guard.Prompt, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield room, listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()
            for reader in room.readers:
                if isinstance(reader, Echo):
                    reader.gate.set()
            room.close()
            listener.close()
