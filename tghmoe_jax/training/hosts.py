"""Several processes as one run: how they find each other, agree, and end together.

A run of one process needs none of this, and every function here is then trivial. With several, all of it goes
through jax's coordination service, which starts in process 0 and to which each process keeps a connection.
"""

import atexit
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path

import jax
from absl import logging
from etils import epath

# The key-value store of the coordination service has no public name; orbax and flax reach it the same way.
from jax._src import distributed
from jax.experimental import multihost_utils

from tghmoe_jax.errors import UserError

WAIT = 300  # seconds that processes wait for each other at the start
_END = 20  # seconds that a process waits for the others before it ends because of an error
_LONG = 3600  # seconds that one process may read more than another
_exchanges = itertools.count()
_LOOK = 10  # seconds that a file may take until other hosts see it
_GONE = jax.errors.JaxRuntimeError  # of the coordination service: no such key, time is up, or process 0 is gone
_TOP = 4096  # entries of a folder that its identity looks at


# ---- beginning ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Place:
    """Which process this is: address of process 0, own number, their number. Each empty (-1, 0) where not given."""

    coordinator: str = ""
    process: int = -1
    processes: int = 0
    wait: int = WAIT

    @classmethod
    def of(cls, coordinator: str, process: str, processes: str, wait: str) -> "Place":
        """From the texts of the flags. UserError where they do not fit each other."""
        numbers = {"--process": process, "--processes": processes, "--wait": wait}
        if wrong := [f"{flag}={text}" for flag, text in numbers.items() if text and not text.isdigit()]:
            raise UserError(f"{wrong[0]} must be a whole number of at least 0.")
        count = int(processes or 0)
        seconds = int(wait or WAIT)
        if seconds < 1:
            raise UserError(f"--wait={wait} is too small; give 1 second or more.")
        if (coordinator or process) and not (coordinator and process and processes):
            raise UserError("--coordinator, --process and --processes belong together; give all three, or none.")
        if processes and count != 1 and not coordinator:
            raise UserError(f"--processes={processes} needs --coordinator=HOST:PORT and --process=I; give all three.")
        if coordinator:
            host, _, port = coordinator.rpartition(":")
            if not host or not port.isdigit() or not 0 < int(port) < 65536:
                raise UserError(f"--coordinator={coordinator} is not an address; give HOST:PORT of process 0.")
            if int(process) >= count:
                raise UserError(f"--process={process} must lie between 0 and {count - 1}, one less than --processes.")
        return cls(coordinator, int(process) if process else -1, count, seconds)


def start(place: Place) -> None:
    """Joins the run's other processes, which flags or the environment of TPU VMs, GKE, Slurm or MPI name.

    Before the first computation. UserError where the environment cannot be understood; processes that do not find
    each other within `place.wait` seconds end with one sentence each.
    """
    if place.processes == 1 or distributed.global_state.client is not None:
        return
    given = {}
    if place.coordinator:
        given = {"coordinator_address": place.coordinator, "num_processes": place.processes,
                 "process_id": place.process, "cluster_detection_method": "deactivate"}  # fmt: skip
    # jax aborts with a page of C++ at its own timeout: this clock is earlier and prints one sentence.
    clock = threading.Timer(place.wait, _not_come, [place])
    clock.daemon = True
    clock.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of clusters that this is not
            jax.distributed.initialize(**given, initialization_timeout=place.wait + 60)
    except Exception as error:
        if not given and isinstance(error, ValueError) and "should be defined" in str(error):
            return  # no cluster
        if not given and isinstance(error, RuntimeError) and "must be called before" in str(error):
            return  # a caller that has used jax stays alone
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"the processes of this run cannot be joined ({text}); name them with --coordinator, --process and "
            "--processes, or give --processes=1 for this process alone."
        ) from error
    finally:
        clock.cancel()
    if several():
        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of processes that compute on the host
        logging.set_verbosity(logging.ERROR)  # orbax would log in every process what process 0 reports
        watch = threading.Thread(target=_watch, daemon=True)
        watch.start()
        # Python would end the thread inside the C++ of jax, which aborts the process.
        atexit.register(lambda: (_over.set(), watch.join()))


def _not_come(place: Place) -> None:
    """Ends a process whose partners are missing, from a thread: the main one is inside jax."""
    state = distributed.global_state
    address = place.coordinator or state.coordinator_address or "an address that the environment gives"
    process = place.process if place.coordinator else state.process_id
    if process == 0:
        what = f"process 0 at {address} waited {place.wait} seconds for the other processes and not all came"
    else:
        what = f"process {process} could not reach process 0 at {address} within {place.wait} seconds"
    print(f"error: {what}; start all of them, with an address that each host can reach.", file=sys.stderr, flush=True)
    os._exit(2)


def several() -> bool:
    """Whether this run has more than one process."""
    return distributed.global_state.num_processes > 1


def first() -> bool:
    """Whether this is the process that prints and writes."""
    return distributed.global_state.process_id == 0


def as_first_sees(value: bool) -> bool:
    """Process 0's value, on every process: hosts may see a file at different moments."""
    return bool(multihost_utils.broadcast_one_to_all(value)) if several() else value


def exchange(text: str) -> list[str]:
    """What every process gives, in the order of the processes. All of them must ask, as often as each other."""
    if not several():
        return [text]
    state, number = distributed.global_state, next(_exchanges)
    state.client.key_value_set(f"exchange/{number}/{state.process_id}", text)
    each = (f"exchange/{number}/{process}" for process in range(state.num_processes))
    return [state.client.blocking_key_value_get(key, _LONG * 1000) for key in each]


# ---- the start check ------------------------------------------------------------------------------------------------


def check(parts: Mapping[str, str], workdir: str | os.PathLike) -> None:
    """UserError, on every process, naming the processes whose `parts` or whose `workdir` are not those of process 0.

    `parts`: what must be the same everywhere, e.g. {"the code": digest}. A file that process 0 writes into `workdir`
    for a moment shows which hosts see another folder under that name.
    """
    if not several():
        return
    state, folder, made = distributed.global_state, epath.Path(workdir), []
    client, me, count = state.client, state.process_id, state.num_processes
    mark = f".start-{uuid.uuid4().hex}"
    problem = ""
    client.wait_at_barrier("start/arrived", WAIT * 1000)  # a process that failed before leaves no folder behind
    if first():
        try:
            # An object store has no folders of its own to leave behind.
            made = [] if "://" in str(workdir) else [one for one in (folder, *folder.parents) if not one.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / mark).write_text("")
        except OSError as error:
            problem = f"--workdir {workdir} cannot be written ({error.strerror or error}); name another folder."
        client.key_value_set("start/mark", mark)
    mark = client.blocking_key_value_get("start/mark", WAIT * 1000)
    mine = {"host": socket.gethostname(), "parts": dict(parts), "sees": bool(problem) or _appears(folder, mark)}
    client.key_value_set(f"start/process/{me}", json.dumps(mine | {"problem": problem}))
    client.wait_at_barrier("start/reported", WAIT * 1000)
    if first() and not problem:
        (folder / mark).unlink(missing_ok=True)
        for one in made:
            if not any(one.iterdir()):
                one.rmdir()
    reports = [json.loads(client.blocking_key_value_get(f"start/process/{i}", WAIT * 1000)) for i in range(count)]
    if reports[0]["problem"]:
        raise UserError(reports[0]["problem"])

    def name(i: int) -> str:
        return f"process {i} on {reports[i]['host']}"

    if blind := [name(i) for i in range(count) if not reports[i]["sees"]]:
        raise UserError(
            f"--workdir {workdir} is another folder for {_some(blind)} than for {name(0)}; name a folder on a disk "
            "that all hosts share, or a URL."
        )
    for what, value in reports[0]["parts"].items():
        if other := [name(i) for i in range(count) if reports[i]["parts"].get(what) != value]:
            raise UserError(f"{what} of {_some(other)} differs from that of {name(0)}; make all hosts the same.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _appears(folder: epath.Path, name: str) -> bool:
    """Whether a file written elsewhere is seen here; a shared disk may need some seconds. Listing refreshes it."""
    until = time.monotonic() + _LOOK
    while True:
        try:
            if (folder / name).exists() or any(one.name == name for one in folder.iterdir()):
                return True
        except OSError:
            pass  # the folder is not there yet
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


def code_version() -> str:
    """A digest of the package's source and of the versions of what computes."""
    root = Path(__file__).parent.parent
    whole = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        whole.update(str(file.relative_to(root)).encode())
        whole.update(file.read_bytes())
    for package in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        whole.update(f"{package} {importlib.metadata.version(package)}".encode())
    return whole.hexdigest()[:16]


def config_digest(flat: Mapping[str, object]) -> str:
    """A digest of a config's keys and values."""
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:16]


def identity(folder: str | os.PathLike) -> str:
    """A digest of a folder's own entries: names and sizes, and the content of small JSON files. Absent: empty."""
    root = epath.Path(folder)
    if not root.is_dir():
        return ""
    whole = hashlib.sha256()
    for entry in sorted(root.iterdir(), key=lambda one: one.name)[:_TOP]:
        whole.update(entry.name.encode())
        if entry.is_dir():
            continue
        size = entry.stat().length
        whole.update(str(size).encode())
        if entry.suffix == ".json" and size < 1 << 20:
            whole.update(entry.read_bytes())
    return whole.hexdigest()[:16]


# ---- ending together ------------------------------------------------------------------------------------------------

_ending = threading.Lock()
_failing = threading.Event()  # the main thread has an error of its own
_over = threading.Event()  # this process ends


def fail(message: str, code: int, trace: str = "") -> int:
    """Ends the run with one sentence, printed by process 0: `code` to return here, or the end of all processes.

    `trace` is printed by the process it belongs to, unless its error only followed from another's.
    """
    if not several():
        print(f"{trace}{message}", file=sys.stderr)
        return code
    _failing.set()
    failure = {"process": distributed.global_state.process_id, "code": code, "message": message}
    try:
        distributed.global_state.client.key_value_set("failed", json.dumps(failure))
    except _GONE:  # another process was first, too
        trace = ""
        if code == 1 or not first():  # where all have the same error, process 0 reports its own
            failure = _failure() or failure
    _end(failure, trace)
    return code


def unexpected(error: BaseException) -> int:
    """`fail` for an error that the user cannot fix: the traceback, and exit code 1."""
    time.sleep(1.0)  # a collective breaks when another process ends: let that one report
    what = f"error: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return fail(what, 1, "".join(traceback.format_exception(error)))


def _failure() -> dict | None:
    """What the first process that failed has reported."""
    try:
        return json.loads(distributed.global_state.client.blocking_key_value_get("failed", 2_000))
    except _GONE:
        return None


def _watch() -> None:
    """Ends this process when another has failed: the main thread may wait for it in a collective for ever."""
    client, failure = distributed.global_state.client, None
    while failure is None:
        if _over.wait(1.0):
            return
        try:
            failure = json.loads(client.key_value_try_get("failed"))
        except _GONE as error:
            if "NOT_FOUND" not in str(error):
                return  # the service has ended, and the run with it
    if failure["process"] == distributed.global_state.process_id or (first() and _failing.wait(2.0)):
        return  # the main thread ends this process
    _end(failure, "")


def _end(failure: dict, trace: str) -> None:
    """Prints (process 0), waits until every process knows, and ends this process without jax's own shutdown."""
    if not _ending.acquire(blocking=False):
        threading.Event().wait()  # the other thread ends the process
    sys.stdout.flush()
    if trace:
        print(trace, file=sys.stderr)
    if first():
        who = f"process {failure['process']}: " if failure["process"] else ""
        print("error: " + who + failure["message"].removeprefix("error: "), file=sys.stderr)
    sys.stderr.flush()
    try:
        distributed.global_state.client.wait_at_barrier("ended", _END * 1000)
    except _GONE:
        pass  # a process that has ended cannot arrive
    if first():
        time.sleep(1.0)  # the service ends last
    os._exit(failure["code"])
