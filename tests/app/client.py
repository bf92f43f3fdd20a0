"""A page without a browser: the requests that it makes, one server."""

import http.client
import json
import time
from pathlib import Path


def packed(files):
    """The body of an upload: [(ending, bytes)]."""
    listed = json.dumps([[ending, len(content)] for ending, content in files]).encode()
    return len(listed).to_bytes(4, "big") + listed + b"".join(content for _, content in files)


def files_of(path):
    """What a user would send of a file or a folder."""
    path = Path(path)
    found = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    return [("".join(one.suffixes[-2:]) if one.name.endswith(".nii.gz") else one.suffix, one.read_bytes())
            for one in found]  # fmt: skip


class Client:
    """One open page at a port. Every answer is (status, parsed JSON or bytes)."""

    def __init__(self, port, headers=()):
        self.port, self.headers = port, dict(headers)
        status, self.facts = self.call("POST", "session")
        assert status == 200, self.facts
        self.headers["x-session"] = self.facts["token"]

    def raw(self, method, path, body=None, headers=()):
        """(status, headers, bytes)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, {**self.headers, **dict(headers)})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def call(self, method, path, body=None):
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        status, headers, content = self.raw(method, f"/api/{path}", body)
        return status, json.loads(content) if "json" in headers.get("content-type", "") else content

    def finished(self):
        """The job as it ended."""
        while True:
            status, job = self.call("GET", "job")
            assert status == 200, job
            if job["state"] in ("done", "failed", "cancelled"):
                return job
            time.sleep(0.02)

    def open(self, files):
        """(result, error) of an upload."""
        status, found = self.call("POST", "upload", packed(files))
        if status != 200:
            return None, found["error"]
        job = self.finished()
        return job["result"], job["error"]

    def example(self, number=0):
        assert self.call("POST", "example", {"number": number})[0] == 200
        return self.finished()["result"]["scan"]

    def ask(self, question, choices=(), report=False, evidence=False, checkpoint=0, min_accuracy=None):
        """(answer, error)."""
        asked = {"question": question, "choices": list(choices), "report": report, "evidence": evidence,
                 "checkpoint": checkpoint, "min_accuracy": min_accuracy}  # fmt: skip
        status, found = self.call("POST", "ask", asked)
        if status != 200:
            return None, found["error"]
        job = self.finished()
        return (job["result"] or {}).get("answer"), job["error"]
