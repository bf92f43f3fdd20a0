"""Who may ask the reading room, and that each one gets what is theirs."""

import base64
import concurrent.futures
import csv
import gc
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest

from tests.app.client import Client, files_of, packed
from tests.app.served import Echo, served
from tests.scans.ct_fixtures import ORIGIN, SECRET, SPACING, patient, write_nifti
from tghmoe_jax.app import __main__ as app
from tghmoe_jax.app import guard
from tghmoe_jax.app.folder import PREFIX, private_folder
from tghmoe_jax.app.jobs import Job, Worker
from tghmoe_jax.app.room import Limits
from tghmoe_jax.app.sessions import IDLE, UNHURRIED, Sessions
from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.volume import Volume

HELD = (  # a server that is killed while it holds a file
    "import sys; from tghmoe_jax.app.folder import private_folder\n"
    "with private_folder(sys.argv[1]) as folder: (folder / 'scan').write_text('x'); print(folder, flush=True); input()"
)


def opened(client, folder, values=None):
    write_nifti(folder / f"{SECRET}.nii", patient() if values is None else values)
    result, error = client.open(files_of(folder / f"{SECRET}.nii"))
    assert not error
    return result["scan"]


# ---- looking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [0, 0.5])
def test_slices_hold_the_values_of_the_file_and_the_affine_gives_its_millimetres(tmp_path, half):
    values = patient().astype(np.float32) + np.float32(half)
    with served(tmp_path) as (_, port):
        client = Client(port)
        scan = opened(client, tmp_path, values)
        for axis, index in ((0, 3), (1, 20), (2, 40)):
            status, headers, data = client.raw("GET", f"/api/slice?axis={axis}&index={index}")
            assert status == 200 and headers["x-type"] == ("float32" if half else "int16")
            found = np.frombuffer(data, headers["x-type"])
            assert np.array_equal(found, np.take(values, index, axis).ravel())
        mm = np.array(scan["affine"]) @ [3, 20, 40, 1]
        assert np.allclose(mm[:3], np.array(ORIGIN) + np.array([40, 20, 3]) * SPACING[::-1])
        model = scan["model"]
        status, headers, data = client.raw("GET", "/api/slice?axis=0&index=2&channel=1")
        assert len(data) == model["axes"][1]["length"] * model["axes"][2]["length"] and headers["x-type"] == "uint8"
        for wrong in ("axis=3&index=0", "axis=0&index=12", "axis=-1&index=0", "axis=0", "axis=0&index=0&channel=3"):
            assert client.call("GET", f"slice?{wrong}")[0] == 400


# ---- asking ----------------------------------------------------------------------------------------------------------


def test_thirty_at_once_each_get_their_own_answers(tmp_path):
    def ask(number):
        client = Client(port)
        opened(client, folders[number], patient() + np.int16(number))
        found = [client.ask(f"question {number}.{i}?") for i in range(3)]
        kept = json.loads(client.raw("GET", "/api/keep?form=json")[2])["answers"]
        return number, found, [row["text"] for row in kept]

    folders = [tmp_path / str(number) for number in range(30)]
    for folder in folders:
        folder.mkdir()
    with served(tmp_path, Limits(waiting=40)) as (room, port), concurrent.futures.ThreadPoolExecutor(30) as pool:
        mean = float(patient().astype(np.float32).mean())
        for number, found, kept in pool.map(ask, range(30)):
            texts = [f"question {number}.{i}? {mean + number:.3f}" for i in range(3)]
            assert [answer["text"] for answer, _ in found] == kept == texts


def test_a_full_queue_is_a_sentence_and_a_waiting_one_has_a_place(tmp_path):
    reader = Echo()
    with served(tmp_path, Limits(waiting=2), [reader]) as (_, port):
        clients = [Client(port) for _ in range(4)]
        for client in clients:
            client.example()
        reader.gate.clear()
        asked = {"question": "q", "choices": [], "report": False, "evidence": False, "checkpoint": 0,
                 "min_accuracy": None}  # fmt: skip
        for number, client in enumerate(clients):
            status, found = client.call("POST", "ask", asked)
            if number == 0:
                assert reader.entered.wait(60)  # it is in work, so the next is the first that waits
            else:
                assert (status, found.get("place")) == ((200, number) if number < 3 else (503, None))
        assert "the queue is full (2 requests wait); ask again in a minute." == found["error"]
        assert clients[1].call("POST", "ask", asked)[0] == 400  # one request of a page
        assert clients[1].call("DELETE", "job")[1]["state"] == "cancelled"
        assert clients[2].call("GET", "job")[1]["place"] == 1
        clients[0].call("DELETE", "job")
        reader.gate.set()
        assert clients[0].finished()["state"] == "cancelled" and clients[0].finished()["result"] is None
        assert clients[2].finished()["result"]["answer"]["text"].startswith("q ")
        assert json.loads(clients[0].raw("GET", "/api/keep?form=json")[2])["answers"] == []


def test_work_of_the_server_itself_lets_users_go_first():
    done, gate = [], threading.Event()
    worker = Worker(2)
    first = worker.submit(Job(lambda job: gate.wait(60), "open", 1))
    while first.state == "waiting":
        pass
    for name in ("spare", "another"):
        worker.spare(Job(lambda job, name=name: done.append(name), "warm-up", 0))
    user = worker.submit(Job(lambda job: done.append("user"), "ask", 2))
    assert user.place == 1
    gate.set()
    while len(done) < 3:
        pass
    assert done == ["user", "spare", "another"] and not worker.close(60)


def test_requests_of_one_page_are_limited(tmp_path):
    with served(tmp_path, Limits(minute=3)) as (_, port):
        client, other = Client(port), Client(port)
        client.example()
        assert [bool(client.ask("q")[0]) for _ in range(3)] == [True, True, False]
        assert "more than 3 requests in 60 seconds" in client.ask("q")[1]
        other.example()


def test_a_request_of_another_form_is_a_sentence(tmp_path):
    changes = [{"question": ""}, {"choices": ["a"]}, {"choices": "ab"}, {"checkpoint": 7}, {"report": 1}, {"more": 1},
               {"question": "x" * 2**17}, {"min_accuracy": True}]  # fmt: skip
    asked = {"question": "q", "choices": [], "report": False, "evidence": False, "checkpoint": 0, "min_accuracy": None}
    with served(tmp_path) as (_, port):
        client = Client(port)
        assert "no scan is open" in client.ask("q")[1]
        client.example()
        for change in changes:
            status, found = client.call("POST", "ask", asked | change)
            assert status in (400, 413) and found["error"].endswith(".") and ";" in found["error"], change
        for body in (b"", b"[]", b"{", b"[" * 2**15, b"\xff"):
            assert client.call("POST", "ask", body)[0] == 400


def test_what_is_kept_names_nobody_and_holds_no_formula(tmp_path):
    with served(tmp_path) as (_, port):
        client = Client(port)
        opened(client, tmp_path)
        question = "=cmd|' /C calc'!A0 <script>alert(1)</script>"
        client.ask(question)
        texts = {form: client.raw("GET", f"/api/keep?form={form}")[2].decode() for form in ("json", "csv", "html")}
        assert client.call("GET", "keep?form=pickle")[0] == 400
    assert not any(SECRET in text or "/tmp" in text for text in texts.values())
    assert json.loads(texts["json"])["answers"][0]["question"] == question
    (row,) = csv.DictReader(io.StringIO(texts["csv"]))
    assert row["question"] == f"'{question}" and row["disclaimer"]
    assert "<script" not in texts["html"] and "http" not in texts["html"] and "not for clinical use" in texts["html"]


# ---- who may come ----------------------------------------------------------------------------------------------------


def test_other_pages_and_other_names_are_refused(tmp_path):
    with served(tmp_path, names=["reader.hospital"]) as (_, port):
        client = Client(port)

        def status(**headers):
            return client.raw("GET", "/api/job", headers={k.replace("_", "-"): v for k, v in headers.items()})[0]

        own = f"127.0.0.1:{port}"
        assert status() == status(origin=f"http://{own}") == status(sec_fetch_site="same-origin") == 200
        for host in (f"localhost:{port}", f"[::1]:{port}", f"reader.hospital:{port}"):
            assert status(host=host) == 200
        for host in (f"evil.example:{port}", "", "127.0.0.1.evil.example", "[", "localhost.evil.example"):
            assert status(host=host) == 421
        for headers in ({"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "http://127.0.0.1:1"},
                        {"sec_fetch_site": "cross-site"}, {"sec_fetch_site": "same-site"}):  # fmt: skip
            assert status(**headers) == 403
        assert client.raw("GET", "/api/job", headers={"x-session": "x"})[0] == 404
        found = client.raw("GET", "/")[1]
        assert "default-src 'none'" in found["content-security-policy"] and found["cache-control"] == "no-store"
        for path in ("/room.py", "/../server.py", "/%2e%2e/server.py", "//etc/passwd", "/static/index.html"):
            assert client.raw("GET", path)[0] == 404


def test_users_of_a_group_need_their_passwords(tmp_path):
    users = tmp_path / "users.txt"
    users.write_text("# radiology\nann:se:cret\n")
    users.chmod(0o644)
    with pytest.raises(UserError, match="may be read by others"):
        guard.read_users(users)
    users.chmod(0o600)
    with served(tmp_path, users=guard.read_users(users)) as (_, port):
        good = {"authorization": "Basic " + base64.b64encode(b"ann:se:cret").decode()}
        client = Client(port, good)
        assert client.raw("GET", "/")[0] == 200
        client.headers.clear()
        assert client.raw("GET", "/")[0] == 401
        bad = ["Basic x", "Bearer x", "Basic " + base64.b64encode(b"ann:secret").decode(), "Basic " + "QQ" * 9]
        assert [client.raw("GET", "/", headers={"authorization": one})[0] for one in 3 * bad] == [401] * 10 + [429] * 2
        assert client.raw("GET", "/", headers=good)[0] == 429
    for text in ("", "ann\n", "ann:\n", ":x\n", b"\xff:x"):
        users.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError, match="--auth-file"):
            guard.read_users(users)


# ---- beginning and end -----------------------------------------------------------------------------------------------


def test_what_a_killed_server_left_is_removed_by_the_next_and_no_other(tmp_path):
    def start():
        process = subprocess.Popen([sys.executable, "-c", HELD, str(tmp_path)], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True)  # fmt: skip
        return process, process.stdout.readline().strip()

    killed, left = start()
    killed.kill()
    killed.wait()
    alive, used = start()
    assert not os.path.exists(left) and os.path.exists(f"{used}/scan")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "elsewhere")
    with private_folder(tmp_path) as folder:
        assert os.path.exists(f"{used}/scan") and folder.stat().st_mode & 0o77 == 0
        assert (tmp_path / "elsewhere").is_dir()
    assert not folder.exists()
    alive.send_signal(signal.SIGKILL)
    alive.wait()


def test_a_page_that_ends_takes_all_with_it(tmp_path):
    with served(tmp_path) as (room, port):
        client = Client(port)
        opened(client, tmp_path)
        client.ask("q")
        session = room.sessions.get(client.facts["token"])
        volume = weakref.ref(session.volume)
        assert client.call("DELETE", "session")[0] == 200
        assert session.volume is None and not session.answers and client.call("GET", "job")[0] == 404
        assert not [one for one in room.folder.rglob("*") if one.is_file()]
        assert not room.close()
        gc.collect()
        assert volume() is None


def test_an_upload_that_breaks_off_leaves_nothing(tmp_path):
    with served(tmp_path) as (room, port):
        client = Client(port)
        body = packed([(".nii", bytes(2**20))])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = f"POST /api/upload HTTP/1.1\r\nhost: localhost\r\nx-session: {client.facts['token']}\r\n"
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[:70_000])
            session = room.sessions.get(client.facts["token"])
            while not session.uploading:
                pass
        while session.uploading:
            pass
        assert not list(room.folder.rglob("*"))
        opened(client, tmp_path)


def test_the_disk_is_bounded_too(tmp_path, monkeypatch):
    monkeypatch.setattr("tghmoe_jax.app.room.STORED", 0.01)
    with served(tmp_path, Limits(bytes=2**20)) as (room, port):
        write_nifti(tmp_path / "scan.nii", patient())
        assert "too many files of others" in Client(port).open(files_of(tmp_path / "scan.nii"))[1]
        assert not list(room.folder.iterdir())


def test_a_page_without_use_ends_and_makes_room_for_others(tmp_path):
    now = [0.0]
    with served(tmp_path) as (room, _):
        sessions = Sessions(room.folder, 3000, lambda: now[0])
        volume = Volume(np.zeros((4, 16, 16), np.float32), "HU", None, "LPS", None, ())  # 4096 bytes
        first, second = sessions.new(), sessions.new()
        with pytest.raises(UserError, match="too many scans"):
            sessions.keep(second, volume, {}, "")
        sessions._memory = 5000
        sessions.keep(second, volume, {}, "")
        with pytest.raises(UserError, match="too many scans"):
            sessions.keep(first, volume, {}, "")
        now[0] += UNHURRIED + 1
        assert sessions.get(first.token) is first
        sessions.keep(first, volume, {}, "")
        assert sessions.get(second.token) is None and second.volume is None
        now[0] += IDLE + 1
        assert sessions.get(first.token) is None and first.volume is None


def test_two_checkpoints_answer_about_one_scan(tmp_path):
    with served(tmp_path, readers=[Echo(), Echo()]) as (_, port):
        client = Client(port)
        client.example()
        answers = [client.ask("q", checkpoint=number)[0] for number in (0, 1)]
        assert [answer["number"] for answer in answers] == [1, 2] and len(client.facts["checkpoints"]) == 2


def test_two_servers_on_one_port_is_a_sentence(capsys):
    listener = guard.listening("127.0.0.1", 0)
    assert app.main(["--port", str(listener.getsockname()[1])]) == 2
    assert "name another with --port." in capsys.readouterr().err
    listener.close()


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--host", "0.0.0.0"], "add --auth-file"),
        (["--host", "hospital"], "is not an address"),
        (["--port", "70000"], "between 0 and 65535"),
        (["--queue", "0"], "--queue 0 must be 1 or more"),
        (["--examples", "/nowhere"], "is no folder"),
        (["--tls", "/nowhere", "/nowhere"], "name a certificate"),
        (["--auth-file", "/nowhere"], "is missing"),
        (["--open"], "see --help"),
    ],
)
def test_a_flag_that_cannot_be_is_a_sentence(flags, part, capsys):
    assert app.main(flags) == 2
    assert part in capsys.readouterr().err
