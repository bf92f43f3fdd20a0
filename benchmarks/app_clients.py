"""Starts the reading room and asks it as one user, then as many at once (docs/app.md).

    python -m benchmarks.app_clients [--scan FOLDER] [--clients 30] [--seconds 300] [--queue 20]

One user: seconds from the start of the command to the first answer about `--scan` (default a drawn phantom), and of the
questions after it. Many: each opens a phantom and asks one question after another, each with a number of its own; an
answer that repeats another question, or whose count has a gap, is counted as wrong. The server's memory is looked at
every second, on Linux.
"""

import argparse
import collections
import concurrent.futures
import http.client
import itertools
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np


class Page:
    """One open page of the server."""

    def __init__(self, port: int):
        self._port, self._token = port, ""
        self._token = self.call("POST", "session")[1]["token"]

    def call(self, method: str, path: str, body: dict | bytes | None = None) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=300)
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        connection.request(method, f"/api/{path}", content, {"x-session": self._token})
        response = connection.getresponse()
        found = response.status, json.loads(response.read())
        connection.close()
        return found

    def wait(self) -> dict:
        while (job := self.call("GET", "job")[1])["state"] in ("waiting", "working"):
            time.sleep(0.2)
        return job

    def open(self, scan: Path | None, number: int = 0) -> None:
        if scan is None:
            status, found = self.call("POST", "example", {"number": number % 3})
        else:
            files = [path.read_bytes() for path in sorted(scan.rglob("*")) if path.is_file()]
            listed = json.dumps([["", len(content)] for content in files]).encode()
            body = b"".join([len(listed).to_bytes(4, "big"), listed, *files])
            status, found = self.call("POST", "upload", body)
        if status != 200 or (job := self.wait())["state"] != "done":
            raise RuntimeError(found.get("error") or job["error"])

    def ask(self, question: str, evidence: bool) -> tuple[str, dict | str]:
        """(`done`, the answer) or (`refused` or `failed`, a sentence)."""
        asked = {"question": question, "choices": ["axial", "coronal", "sagittal"], "report": False,
                 "evidence": evidence, "checkpoint": 0, "min_accuracy": None}  # fmt: skip
        status, found = self.call("POST", "ask", asked)
        if status != 200:
            return "refused", found["error"]
        job = self.wait()
        return (job["state"], job["result"]["answer"]) if job["state"] == "done" else ("failed", job["error"])


def start(*flags: str) -> tuple[subprocess.Popen, int]:
    """A server and its port."""
    command = [sys.executable, "-m", "tghmoe_jax.app", "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return process, int(re.search(r":(\d+)/", process.stdout.readline())[1])


def alone(scan: Path | None) -> None:
    """One user."""
    begun = time.perf_counter()
    process, port = start()
    print(f"the page is there after {time.perf_counter() - begun:.1f} s")
    page = Page(port)
    page.open(scan)
    print(f"the scan is open after {time.perf_counter() - begun:.1f} s")
    page.ask("Which plane is this?", True)
    print(f"the first answer, with evidence, is there after {time.perf_counter() - begun:.1f} s")
    for question, evidence in (("Which organ is abnormal?", True), ("Which phase is this?", False)):
        begun = time.perf_counter()
        page.ask(question, evidence)
        print(f"another answer{', with evidence' if evidence else ''}: {time.perf_counter() - begun:.1f} s")
    process.terminate()
    process.wait()


def many(clients: int, seconds: float, queue: int) -> None:
    """Many users at once, each a thread."""
    process, port = start("--queue", str(queue), "--minute", "100000")
    counts, waits, memory, over = collections.Counter(), [], [], threading.Event()

    def watch() -> None:
        while not over.wait(1):
            text = Path(f"/proc/{process.pid}/status").read_text()
            memory.append(int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024)

    def use(number: int) -> None:
        page = Page(port)
        while True:
            try:
                page.open(None, number)
                break
            except RuntimeError:  # the queue is full
                counts["queue full when opening"] += 1
                time.sleep(1)
        given = 0
        for turn in itertools.count(1):
            if time.perf_counter() > end:
                return
            question, begun = f"Which plane is this, {number} {turn}?", time.perf_counter()
            state, found = page.ask(question, turn % 3 == 0)
            if state == "done":
                given += 1
                waits.append(time.perf_counter() - begun)
                right = found["question"] == question and found["number"] == given
                counts["answers" if right else "WRONG answers"] += 1
            else:
                counts["queue full" if "queue is full" in found else f"OTHER: {found}"] += 1
                time.sleep(1)

    end = time.perf_counter() + seconds
    watcher = threading.Thread(target=watch)
    watcher.start()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        for one in [pool.submit(use, number) for number in range(clients)]:
            one.result()
    over.set()
    watcher.join()
    process.terminate()
    process.wait()
    print(f"{clients} clients for {seconds:.0f} s, {queue} may wait: {dict(counts)}")
    print(f"seconds to an answer: median {np.median(waits):.1f}, 95 % {np.quantile(waits, 0.95):.1f}, "
          f"longest {max(waits):.1f}")  # fmt: skip
    marks = [round(np.mean(part)) for part in np.array_split(memory, 6)]
    print(f"MiB of the server in each sixth of the time: {marks}, {max(memory):.0f} at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scan", type=Path, help="folder of one DICOM series")
    parser.add_argument("--clients", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--queue", type=int, default=20)
    args = parser.parse_args()
    alone(args.scan)
    many(args.clients, args.seconds, args.queue)


if __name__ == "__main__":
    main()
