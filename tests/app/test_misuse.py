"""Requests at the wrong moment, senders who stall, and names and words that are not what they seem."""

import asyncio
import csv
import errno
import io
import json
import os
import socket
import threading
import weakref
import zipfile

import pytest

from tests.app.bad_uploads import nifti, zipped
from tests.app.client import Client, packed
from tests.app.served import served
from tghmoe_jax.app import __main__ as app
from tghmoe_jax.app import guard, kept, uploads, views
from tghmoe_jax.app.examples import phantom
from tghmoe_jax.app.folder import private_folder, remove
from tghmoe_jax.app.jobs import Job, Worker
from tghmoe_jax.app.room import Limits
from tghmoe_jax.errors import UserError

ASKED = {"question": "q", "choices": [], "report": False, "evidence": False, "checkpoint": 0, "min_accuracy": None}


def files(folder):
    return [one for one in folder.rglob("*") if one.is_file()]


@pytest.fixture
def held(monkeypatch):
    """Reading of scans waits for `go`; `begun` says that one is being read."""
    from tghmoe_jax.app import room

    go, begun, read = threading.Event(), threading.Event(), room.read_volume

    def waiting(*args):
        begun.set()
        assert go.wait(60)
        return read(*args)

    monkeypatch.setattr(room, "read_volume", waiting)
    yield begun, go
    go.set()


# ---- several zip files -----------------------------------------------------------------------------------------------


def test_two_zip_files_of_one_scan_each_are_two_scans(tmp_path):
    scan = nifti(tmp_path)
    with served(tmp_path) as (_, port):
        result, error = Client(port).open([(".zip", zipped({"a.nii": scan})), (".zip", zipped({"b.nii": scan}))])
    assert not error and result == {"choices": ["a .nii file"] * 2}


def test_the_bound_of_what_is_unpacked_counts_all_zip_files(tmp_path):
    """One zip file alone stays below it."""
    content = os.urandom(2**20)
    sent = [(".zip", zipped({f"a{ending}": content}, zipfile.ZIP_STORED)) for ending in (".nii", ".npy", ".nrrd")]
    folder = tmp_path / "in"
    asyncio.run(uploads.receive(chunks_of(packed(sent)), len(packed(sent)), folder, 2**30))
    with pytest.raises(UserError, match="more than the"):
        uploads.choices_of(folder, 2 * 2**20)
    assert sum(one.stat().st_size for one in files(folder) if one.suffix != ".zip") <= 2 * 2**20


def test_the_number_of_files_counts_all_zip_files(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_FILES", 5)
    sent = [(".zip", zipped({f"{name}{i}.dcm": b"" for i in range(3)})) for name in "ab"]
    folder = tmp_path / "in"
    asyncio.run(uploads.receive(chunks_of(packed(sent)), len(packed(sent)), folder, 2**30))
    with pytest.raises(UserError, match="more than 5 files"):
        uploads.choices_of(folder, 2**20)


async def chunks_of(body, step=2**16):
    for start in range(0, len(body), step):
        yield body[start : start + step]


# ---- at the wrong moment ---------------------------------------------------------------------------------------------


def test_a_cancelled_scan_leaves_neither_file_nor_volume(tmp_path, held):
    begun, go = held
    scan = [(".nii", nifti(tmp_path))]
    (tmp_path / "room").mkdir()
    with served(tmp_path / "room") as (room, port):
        first, second = Client(port), Client(port)
        first.call("POST", "upload", packed(scan))
        assert begun.wait(60)
        second.call("POST", "upload", packed(scan))
        assert second.call("DELETE", "job")[1]["state"] == "cancelled"  # it waited
        assert len(files(room.folder)) == 1  # of the first
        room.sessions.keep, keep = (lambda *args: (keep(*args), first.call("DELETE", "job"))), room.sessions.keep
        go.set()
        assert first.finished()["state"] == "cancelled"  # too late for anything but the end of the job
        assert not files(room.folder) and first.call("GET", "slice?axis=0&index=0")[0] == 400


def test_a_scan_that_was_closed_while_it_was_read_does_not_open(tmp_path, held):
    begun, go = held
    with served(tmp_path) as (room, port):
        client = Client(port)
        client.call("POST", "upload", packed([(".nii", nifti(tmp_path))]))
        assert begun.wait(60)
        assert client.call("DELETE", "scan")[0] == 200
        go.set()
        assert client.finished()["state"] == "cancelled"
        assert client.call("GET", "slice?axis=0&index=0")[0] == 400 and not files(room.folder)


def test_nothing_else_is_begun_while_files_are_sent(tmp_path):
    with served(tmp_path) as (room, port):
        client = Client(port)
        token, body = client.facts["token"], packed([(".nii", nifti(tmp_path))])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = f"POST /api/upload HTTP/1.1\r\nhost: localhost\r\nx-session: {token}\r\nconnection: close\r\n"
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[:1000])
            while not room.sessions.get(token).uploading:
                pass
            for method, path, asked in (("POST", "example", {"number": 0}), ("DELETE", "scan", None)):
                status, found = client.call(method, path, asked)
                assert status == 400 and "has a request in work" in found["error"]
            connection.sendall(body[1000:])
            while connection.recv(2**16):
                pass
        assert client.finished()["state"] == "done"
        assert client.call("GET", "slice?axis=0&index=0")[0] == 200


def test_a_page_that_ends_while_its_files_are_sent_is_a_sentence(tmp_path):
    with served(tmp_path) as (room, port):
        client = Client(port)
        token, body = client.facts["token"], packed([(".nii", bytes(2**20)), (".nii", b"x")])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = f"POST /api/upload HTTP/1.1\r\nhost: localhost\r\nx-session: {token}\r\nconnection: close\r\n"
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[:70_000])
            while not files(room.folder):
                pass
            client.call("DELETE", "session")
            connection.sendall(body[70_000:])
            answer = b"".join(iter(lambda: connection.recv(2**16), b""))
        assert b"the page was closed." in answer and not files(room.folder)


def test_choosing_among_series_is_limited_too(tmp_path):
    scan = nifti(tmp_path)
    with served(tmp_path, Limits(minute=2)) as (_, port):
        client = Client(port)
        client.open([(".nii", scan), (".nii", scan)])
        said = []
        for number in (0, 1):
            said.append(client.call("POST", "choose", {"number": number})[0])
            client.finished()
        assert said == [200, 400]


def test_a_folder_is_emptied_though_files_are_still_written_there(tmp_path):
    """A thread that unpacks goes on for a moment when its page or its server ends."""
    stop, wrote = threading.Event(), threading.Event()

    def write(folder):
        number = 0
        while not stop.is_set():
            try:
                (folder / "dicom" / f"{number}.dcm").write_bytes(b"x")
            except OSError:
                continue
            number += 1
            if number > 500:
                wrote.set()

    for ends in (False, True):
        with private_folder(tmp_path) as folder:
            part = folder / "session"
            (part / "dicom").mkdir(parents=True)
            thread = threading.Thread(target=write, args=(part,))
            thread.start()
            assert wrote.wait(60)
            if not ends:
                remove(part)
                assert not files(folder)
        stop.set()
        thread.join()
        assert not list(tmp_path.iterdir())
        stop.clear(), wrote.clear()


# ---- senders and readers who stall -----------------------------------------------------------------------------------


def test_an_upload_that_drips_is_given_up(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(uploads.time, "monotonic", lambda: now[0])

    async def drops(seconds):
        for start in range(0, len(body), 1000):
            now[0] += seconds
            yield body[start : start + 1000]

    body = packed([(".nii", bytes(100_000))])
    asyncio.run(uploads.receive(drops(0.1), len(body), tmp_path / "fast", 2**20))
    with pytest.raises(UserError, match="too slowly"):
        asyncio.run(uploads.receive(drops(uploads.SILENT - 1), len(body), tmp_path / "slow", 2**20))


def test_a_question_that_is_never_sent_to_its_end_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("tghmoe_jax.app.server.SILENT", 0.1)
    with served(tmp_path) as (_, port), socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        token = Client(port).facts["token"]
        connection.sendall(f"POST /api/ask HTTP/1.1\r\nhost: localhost\r\nx-session: {token}\r\n".encode())
        connection.sendall(b"content-length: 100\r\n\r\n{")
        assert b"408" in connection.recv(2**16)


def test_a_connection_that_asks_nothing_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "UNASKED", 0.1)
    with served(tmp_path) as (_, port):
        for sent in (b"", b"GET / HTTP/1.1\r\nhost:"):
            with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                connection.sendall(sent)
                assert connection.recv(100) == b""
        reader = Client(port)  # one that asks stays, however long the answer takes
        assert reader.example()


def test_a_scan_is_not_kept_for_a_browser_that_stops_reading():
    volume = phantom("chest")
    length, parts = views.nifti_parts(volume)
    first, kept_alive = next(parts), weakref.ref(volume)
    assert len(first) == 352 and length > 352
    next(parts)
    del volume
    assert kept_alive() is None and list(parts) == []


# ---- names and words -------------------------------------------------------------------------------------------------


def test_odd_names_and_origins_are_refused(tmp_path):
    with served(tmp_path) as (_, port):
        client, own = Client(port), f"127.0.0.1:{port}"

        def status(method="GET", **headers):
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return client.raw(method, "/api/job", headers=named)[0]

        assert status(origin=f"http://{own}") == status(origin=f"https://{own}") == 200
        for host in (f"{own}/x", f"{own}/x?", f"x@{own}", f"{own}#x", "127.0.0.1:x", "[::1]:x", "localhost/room.js?"):
            assert status(host=host) == 421, host
        for origin in ("http://[", f"//{own}", f"http://{own}/x", f"ftp://{own}"):
            assert status(origin=origin) == 403, origin
        link = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"}
        assert status(**link) == 200 and status("DELETE", **link) == 403
        assert client.raw("GET", "/api/job/")[0] == 404


def test_no_name_server_is_asked_for_this_machines_names(monkeypatch):
    def asked(*args):
        raise AssertionError("another host is asked")

    for name in ("getfqdn", "gethostbyaddr", "gethostbyname", "gethostbyname_ex", "getaddrinfo"):
        monkeypatch.setattr(socket, name, asked)
    assert guard.own_names(["reader.hospital"]) == ("reader.hospital", socket.gethostname())


def test_wrong_passwords_of_many_addresses_are_forgotten():
    now = [0.0]
    app = guard.Guarded(None, (), {"ann": b""}, clock=lambda: now[0])
    for number in range(100):
        now[0] += 1
        headers = guard.Headers({"host": "localhost", "authorization": "x"})
        assert app._refused("GET", headers, f"10.0.0.{number}").status_code == 401
    assert len(app._wrong) <= 61


@pytest.mark.parametrize("key", ["", "not PEM", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_key_that_is_none_is_a_sentence(tmp_path, key, capsys):
    for name in ("cert", "key"):
        (tmp_path / name).write_text(key)
    assert app.main(["--port", "0", "--tls", str(tmp_path / "cert"), str(tmp_path / "key")]) == 2
    assert "name a certificate and its key in PEM." in capsys.readouterr().err


def test_what_is_kept_moves_no_cursor_and_turns_no_letters(tmp_path):
    with served(tmp_path) as (_, port):
        client = Client(port)
        client.example()
        client.ask("a\x1b]0;title\x07\x1b[2Jb \u202e evil \x00")
        texts = {form: client.raw("GET", f"/api/keep?form={form}")[2].decode() for form in kept.FORMS}
    for text in texts.values():
        assert not any(letter in text for letter in "\x1b\x07\x00\u202e")
    (row,) = csv.DictReader(io.StringIO(texts["csv"]))
    assert row["question"].startswith("a\\x1b]0;title\\x07") and "a\\x1b]0;" in texts["html"]
    assert json.loads(texts["json"])["answers"][0]["question"].startswith("a\x1b]0;")


def test_a_full_disk_is_a_sentence():
    def fill(job):
        raise OSError(errno.ENOSPC, "No space left on device", "/a/path")

    worker = Worker(1)
    job = worker.submit(Job(fill, "open", 1))
    while not job.over:
        pass
    assert job.error.startswith("the disk of the server is full") and not worker.close(60)
