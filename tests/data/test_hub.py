"""`hf:owner/name` through the hub's own client, from a stand-in of the hub on this machine."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

API = "/api/datasets/owner/name"
NAMES = [f"data/train-{i:05}-of-00002.parquet" for i in range(2)]
COMMITS = ("a" * 40, "b" * 40)
TEXTS = [[f"file {i} row {row} " + "x" * 2000 for row in range(60)] for i in range(2)]

PROGRAM = """
import json, os, sys
from pathlib import Path
from fla_dist.config import SourceConfig
from fla_dist.data.documents import read_documents
from fla_dist.data.sources import resolve_sources

def resolve(plans, **settings):
    config = SourceConfig("hf:owner/name", **settings)
    return resolve_sources([config], "data.sources", plans=plans)[0].units

plans = Path(sys.argv[1])
units, again, newest = resolve(plans), resolve(plans), resolve(None)
named = resolve(None, revision=sys.argv[2])
names = [[unit.pieces[0].name for unit in found] for found in (units, again, newest, named)]
print(json.dumps({"names": names, "texts": [read_documents(unit) for unit in units]}))
sys.stdout.flush()
os._exit(0)  # the client's own threads have been seen to abort the interpreter's end
"""


def parquet(texts: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), file, row_group_size=20, compression="none")
    return file.getvalue()


class Hub(BaseHTTPRequestHandler):
    """A dataset of two files, to which a commit is added whenever its newest one is asked for."""

    protocol_version = "HTTP/1.1"
    files = dict(zip(NAMES, map(parquet, TEXTS), strict=True))
    asked: list[str] = []

    def do_GET(self) -> None:
        path, _, _ = self.path.partition("?")
        if path == API:
            self.asked.append(path)
            self.send_json({"id": "owner/name", "sha": COMMITS[min(len(self.asked), 2) - 1]})
        elif match := re.fullmatch(rf"{API}/revision/(\w+)", path):
            self.send_json({"id": "owner/name", "sha": match[1]})
        elif re.fullmatch(rf"{API}/tree/\w+", path):
            self.send_json([{"type": "directory", "path": "data", "oid": "0" * 40}])
        elif re.fullmatch(rf"{API}/tree/\w+/data", path):
            entries = [(name, len(content)) for name, content in self.files.items()]
            self.send_json(
                [{"type": "file", "path": n, "size": size, "oid": "0" * 40} for n, size in entries]
            )
        elif (match := re.fullmatch(r"/datasets/owner/name/resolve/\w+/(.*)", path)) and (
            content := self.files.get(match[1])
        ):
            self.send_range(content)
        else:
            self.send(b"{}", 404, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def send_json(self, value: object) -> None:
        self.send(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def send_range(self, content: bytes) -> None:
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        last = first + len(part) - 1
        self.send(part, 206, {"Content-Range": f"bytes {first}-{last}/{len(content)}"})

    def send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_dataset_is_streamed_and_stays_at_the_commit_first_seen(hub, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "plans"), COMMITS[0]],
        env={**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    found = json.loads(done.stdout)
    at = [
        [f"parquet::hf://datasets/owner/name@{commit}/{name}" for name in NAMES]
        for commit in COMMITS
    ]
    assert found["names"] == [at[0], at[0], at[1], at[0]]
    assert found["texts"] == TEXTS
    assert not list(tmp_path.rglob("*.parquet"))
