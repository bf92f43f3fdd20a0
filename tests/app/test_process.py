"""The command itself: a server that is killed, and what it prints."""

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.app.client import Client, files_of, packed
from tests.scans.ct_fixtures import SECRET, write_dicom
from tests.tiny_run import ROOT
from tghmoe_jax.app.folder import PREFIX

pytestmark = pytest.mark.slow


def start(folder, *flags):
    """A server whose private folder lies in `folder`, and its port."""
    command = [sys.executable, "-m", "tghmoe_jax.app", "--port", "0", *flags]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TMPDIR": str(folder)}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    return process, int(re.search(r"http://127.0.0.1:(\d+)/", process.stdout.readline())[1])


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_server_killed_in_an_answer_leaves_nothing_after_the_next_start(tmp_path):
    own, study = tmp_path / "tmp", tmp_path / "study"
    own.mkdir()
    write_dicom(study, series=1), write_dicom(study, series=2)
    process, port = start(own)
    client = Client(port)
    result, _ = client.open(files_of(study))
    assert len(result["choices"]) == 2 and files(own)  # the other series may be chosen
    client.call("POST", "choose", {"number": 0})
    client.finished()
    answer, error = client.ask(f"Is {SECRET} ill?", ["yes", "no"], evidence=True)
    assert answer["evidence"]["region"]["centre_mm"] and not error
    body = {"question": "q", "choices": [], "report": False, "evidence": True, "checkpoint": 0, "min_accuracy": None}
    assert client.call("POST", "ask", body)[1]["state"] in ("waiting", "working")
    process.kill()
    printed = "".join(process.communicate())
    assert SECRET not in printed and "ask done" in printed and files(own)

    process, port = start(own)
    assert not files(own) and len(list(own.iterdir())) == 1
    assert Client(port).call("POST", "upload", packed([(".nii", b"no scan")]))[0] == 200
    process.send_signal(signal.SIGTERM)
    printed = "".join(process.communicate())
    assert process.returncode == 143 and printed.endswith("stopped by SIGTERM.\n") and "Traceback" not in printed
    assert not list(own.glob(f"{PREFIX}*"))
