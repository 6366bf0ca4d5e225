"""Builders: one at a time, taken over when dead, and what they fail of reaches everyone."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fla_dist.data import DataError, load_tokenizer
from fla_dist.data import cache as cache_module
from fla_dist.data import lease as lease_module
from fla_dist.data.builder import Builder, Closed, Worker
from fla_dist.data.cache import TokenCache
from fla_dist.data.lease import Lease
from fla_dist.data.plan import Plan

from .conftest import TOKENIZER, write_sources

HOLD = (
    "import sys, time; from pathlib import Path; from fla_dist.data.lease import Lease\n"
    "lease = Lease(Path(sys.argv[1])); print(lease.try_acquire(), flush=True); time.sleep(60)"
)


@pytest.fixture
def plan(own_data_config) -> Plan:
    tokenizer = load_tokenizer(TOKENIZER, own_data_config)
    return Plan.make(own_data_config, tokenizer, "train")


@pytest.fixture
def make_builder(plan):
    builders = []

    def make(num_workers=1) -> Builder:
        builders.append(plan.make_builder(plan.units, num_workers))
        return builders[-1]

    yield make
    for builder in builders:
        builder.close()


def spoil(plan: Plan) -> Path:
    """Makes a text file undecodable, its size and time as planned."""
    piece = plan.sources[1].units[0].pieces[0]
    path = Path(piece.path)
    path.write_bytes(b"\xff" * piece.size)
    os.utime(path, ns=(piece.mtime_ns, piece.mtime_ns))
    return path


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_lease_has_one_holder(tmp_path):
    first, second = Lease(tmp_path / "lease"), Lease(tmp_path / "lease")
    assert first.try_acquire() and not second.try_acquire()
    second.release()
    assert not second.try_acquire()
    first.release()
    assert second.try_acquire()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_holder_s_lease_is_taken_over(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "lease")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "True\n"
    lease = Lease(tmp_path / "lease")
    assert not lease.try_acquire()
    process.send_signal(signal.SIGKILL)
    wait_until(lease.try_acquire)  # before it is reaped
    process.wait()
    lease.release()


def test_another_host_s_lease_lasts_while_its_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "STALE_SECONDS", 0.2)
    path = tmp_path / "lease"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1", "token": "x"}))
    lease = Lease(path)
    for i in range(4):
        os.utime(path, (i, i))  # whatever its clock says
        assert not lease.try_acquire()
        time.sleep(0.1)
    wait_until(lease.try_acquire)
    lease.release()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "x"}'])
def test_a_damaged_lease_holds_nobody(tmp_path, content):
    (tmp_path / "lease").write_text(content)
    lease = Lease(tmp_path / "lease")
    assert lease.try_acquire()
    lease.release()


def test_all_units_are_built_once_by_several_builders(plan, make_builder):
    builders = [make_builder(2), make_builder(2)]
    for builder in builders:
        builder.start()
    progress = []
    for builder in builders:
        builder.build_all(progress.append)
    shards = list((plan.cache.directory / "shards").iterdir())
    assert len(shards) == plan.num_units() == progress[-1]
    assert sum(len(builder._workers) > 0 for builder in builders) == 1


def test_building_goes_on_after_the_builder_is_killed(plan, own_data_config, make_builder):
    """SIGKILL at arbitrary moments; every time something is whole or not there."""
    program = (
        "import sys, json; from fla_dist.config import *; from fla_dist.data.plan import Plan\n"
        "from fla_dist.data import sources; from fla_dist.data.tokenizer import open_tokenizer\n"
        "from pathlib import Path; sources.SMALLEST_UNIT_BYTES = 5000\n"
        "from fla_dist.config import _build\n"
        "data = _build(DataConfig, json.loads(sys.argv[1]), 'data')\n"
        "plan = Plan.make(data, open_tokenizer(Path(sys.argv[2])), 'train')\n"
        "plan.make_builder(plan.units, 2).build_all(lambda *_: print('.', flush=True))"
    )
    config = json.dumps(
        {
            "sources": [vars(source) for source in own_data_config.sources],
            "sequence_length": 64,
            "cache_dir": own_data_config.cache_dir,
        }
    )
    for seconds in (0.3, 0.5, 0.05):
        process = subprocess.Popen(
            [sys.executable, "-c", program, config, str(plan.tokenizer.path)],
            stdout=subprocess.PIPE,
        )
        assert process.stdout.readline()
        time.sleep(seconds)
        process.kill()
        process.wait()
        process.stdout.close()
        for unit in plan.units():
            if plan.cache.is_built(unit):
                plan.cache.open(unit).verify()
    make_builder().build_all(lambda *_: None)
    for unit in plan.units():
        plan.cache.open(unit).verify()


def test_leftovers_of_dead_builders_are_removed(plan, make_builder):
    builder = make_builder()
    builder.build_all(lambda *_: None)
    dead = subprocess.Popen(["true"])
    dead.wait()
    shards = plan.cache.directory / "shards"
    host = os.uname().nodename
    (shards / f".tmp-{host}-{dead.pid}-0").touch()
    (shards / f".tmp-{host}-{os.getpid()}-0").touch()
    plan.cache.remove_leftovers()
    assert [path.name for path in shards.glob(".tmp*")] == [f".tmp-{host}-{os.getpid()}-0"]


def test_what_cannot_be_built_is_said_to_every_waiting_builder(plan, make_builder):
    path = spoil(plan)
    bad = plan.sources[1].units[0]
    messages = set()
    for builder in [make_builder(), make_builder()]:
        with pytest.raises(DataError, match=rf"{path.name}:1: byte 0 \(0xff\) is not") as caught:
            builder.wait_for(bad)
        messages.add(str(caught.value))
    assert len(messages) == 1


@pytest.mark.parametrize("on_bad_source", ["error", "quarantine"])
@pytest.mark.parametrize("flipped", [0x01, 0x80])  # another letter; no UTF-8 text
def test_a_bit_that_flips_in_a_source_after_it_was_built_never_changes_tokens(
    plan, on_bad_source, flipped
):
    """A shard is lost, and its source has the size and time that it had."""
    unit = plan.sources[1].units[0]
    piece = unit.pieces[0]
    cache = TokenCache(plan.cache.directory, plan.tokenizer.sha256, on_bad_source)
    cache.build(unit, plan.tokenizer)
    (shard,) = (cache.directory / "shards").iterdir()
    good, tokens = Path(piece.path).read_bytes(), shard.read_bytes()
    for content in (bytes([good[0] ^ flipped]) + good[1:], good):
        shard.write_bytes(tokens[:-1])
        cache.discard_if_damaged(unit)
        Path(piece.path).write_bytes(content)
        os.utime(piece.path, ns=(piece.mtime_ns, piece.mtime_ns))
        if content != good:
            with pytest.raises(DataError, match=rf"{piece.name}.*not (what was enc|UTF-8 text)"):
                cache.build(unit, plan.tokenizer)
            assert not cache.is_built(unit)
    cache.build(unit, plan.tokenizer)
    assert shard.read_bytes() == tokens


def test_an_old_failure_is_tried_again(plan, make_builder):
    bad = plan.sources[1].units[0]
    plan.cache.write_failure(bad, "the disk was full")
    make_builder().wait_for(bad)
    assert plan.cache.is_built(bad)


def test_a_worker_that_dies_is_replaced(plan):
    units = list(plan.units())
    worker = Worker(plan.cache, plan.tokenizer.path)
    assert worker.build(units[0]) is None
    worker._process.send_signal(signal.SIGTERM)  # meant for training: ignored
    assert worker.build(units[1]) is None
    worker._process.kill()
    assert worker.build(units[2]) is None
    worker.stop()
    assert worker.build(units[3]) == "the builder is closed"


def test_a_worker_that_cannot_run_is_an_error_and_no_hang(plan):
    worker = Worker(plan.cache, plan.cache.directory / "absent.json")
    message = worker.build(next(plan.units()))
    assert message is not None and "the builder process ended with status 1" in message
    worker.stop()


def test_a_full_disk_is_a_clean_error(plan, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module, "write_shard", fail)
    with pytest.raises(DataError, match=r"data\.cache_dir: .*No space left on device"):
        plan.cache.build(next(plan.units()), plan.tokenizer)
    assert not plan.cache.is_built(next(plan.units()))


def test_waiting_ends_when_the_builder_is_closed(plan, make_builder):
    builder = make_builder()
    builder.close()
    with pytest.raises(Closed):
        builder.wait_for(next(plan.units()))


def test_moved_files_are_not_encoded_again(plan, own_data_config, make_builder, tmp_path):
    make_builder().build_all(lambda *_: None)
    shards = plan.cache.directory / "shards"
    before = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    moved = replace(own_data_config, sources=write_sources(tmp_path / "moved"))
    other = Plan.make(moved, plan.tokenizer, "train")
    assert other.sha256 == plan.sha256
    builder = other.make_builder(other.units, 1)
    builder.build_all(lambda *_: None)
    builder.close()
    assert {path.name: path.stat().st_mtime_ns for path in shards.iterdir()} == before


HOST = (
    "import sys, json, socket; host = sys.argv[3]; socket.gethostname = lambda: host\n"
    "from fla_dist.config import DataConfig, _build; from fla_dist.data.plan import Plan\n"
    "from fla_dist.data import sources; from fla_dist.data.tokenizer import open_tokenizer\n"
    "from fla_dist.data.builder import Worker; from pathlib import Path\n"
    "sources.SMALLEST_UNIT_BYTES = 5000\n"
    "data = _build(DataConfig, json.loads(sys.argv[1]), 'data')\n"
    "plan = Plan.make(data, open_tokenizer(Path(sys.argv[2])), 'train')\n"
    "build = Worker.build\n"
    "def logged(self, unit):\n"
    "    print(host, plan.cache.unit_name(unit), flush=True); return build(self, unit)\n"
    "Worker.build = logged\n"
    "builder = plan.make_builder(plan.units, 1)\n"
    "print('ready', flush=True); sys.stdin.readline()\n"
    "builder.build_all(lambda _: None); builder.close()\n"
)


def as_json(data) -> str:
    return json.dumps(
        {
            "sources": [vars(source) for source in data.sources],
            "sequence_length": 64,
            "cache_dir": data.cache_dir,
        }
    )


def test_hosts_build_one_cache_together_and_no_unit_twice(plan, own_data_config):
    arguments = [sys.executable, "-c", HOST, as_json(own_data_config), str(plan.tokenizer.path)]
    hosts = [
        subprocess.Popen(
            [*arguments, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in ("first", "second")
    ]
    for host in hosts:
        assert host.stdout.readline() == "ready\n"
    for host in hosts:
        host.stdin.write("go\n")
        host.stdin.flush()
    built = [line.split() for host in hosts for line in host.communicate(timeout=60)[0].split("\n")]
    names = [name for _, name in filter(None, built)]
    assert len(names) == len(set(names)) == plan.num_units()
    for unit in plan.units():
        plan.cache.open(unit).verify()
    assert list((plan.cache.directory / "leases").iterdir()) == []


def test_what_a_dead_host_had_begun_is_built_last(plan, make_builder, monkeypatch):
    monkeypatch.setattr(lease_module, "STALE_SECONDS", 0.5)
    first = next(plan.units())
    path = plan.cache.directory / "leases" / plan.cache.unit_name(first)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1", "token": "x"}))
    make_builder().build_all(lambda _: None)
    records = sorted((plan.cache.directory / "units").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    assert records[-1].stem == plan.cache.unit_name(first)


def test_a_complete_cache_is_not_looked_through_again(plan, make_builder):
    make_builder().build_all(lambda _: None)
    again = make_builder(2)
    again.start()
    again._thread.join()
    assert again._workers == []
    unit = next(plan.units())
    next((plan.cache.directory / "units").glob(plan.cache.unit_name(unit) + "*")).unlink()
    again.wait_for(unit)
    assert plan.cache.is_built(unit)


def test_a_full_tmpfs_is_a_clean_error_and_building_goes_on_later(
    own_data_config, tmp_path, monkeypatch
):
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mounted)], capture_output=True
    )
    if made.returncode:
        pytest.skip("no right to mount a tmpfs")
    try:
        data = replace(own_data_config, cache_dir=str(mounted))
        plan = Plan.make(data, load_tokenizer(TOKENIZER, data), "train")
        ballast = mounted / "ballast"
        with open(ballast, "wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(b"x" * 4096)
        os.truncate(ballast, ballast.stat().st_size - 40 * 1024)
        builder = plan.make_builder(plan.units, 1)
        with pytest.raises(DataError, match=r"data\.cache_dir: .*No space left on device"):
            builder.build_all(lambda _: None)
        builder.close()
        assert not list(mounted.rglob("shards/.tmp*"))
        for unit in filter(plan.cache.is_built, plan.units()):
            plan.cache.open(unit).verify()
        ballast.unlink()
        builder = plan.make_builder(plan.units, 1)
        builder.build_all(lambda _: None)
        builder.close()
    finally:
        subprocess.run(["umount", "-l", str(mounted)], check=True)


KILLED_BETWEEN_CALLS = """
import builtins, json, os, shutil, signal, sys
from pathlib import Path
from fla_dist.data.cache import TokenCache
from fla_dist.data.tokenizer import open_tokenizer
from fla_dist.data.units import Unit
import pyarrow
directory, unit = Path(sys.argv[1]), Unit.from_json(json.loads(sys.argv[3]))

def child(work):
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def build(kill_before):
    tokenizer = open_tokenizer(Path(sys.argv[2]))
    cache = TokenCache(directory, tokenizer.sha256)
    if kill_before is not None:
        calls = iter(range(1000))
        def named(module, name):
            real = getattr(module, name)
            def counted(*arguments, **options):
                if next(calls) == kill_before:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)
            setattr(module, name, counted)
        for name in ("open", "fsync", "rename", "link", "unlink", "close", "mkdir", "utime"):
            named(os, name)
        named(builtins, "open")
    lease = cache.make_lease(unit)
    assert lease.try_acquire()
    if not cache.is_built(unit):
        cache.build(unit, tokenizer)
    lease.release()

def check():
    tokenizer = open_tokenizer(Path(sys.argv[2]))
    cache = TokenCache(directory, tokenizer.sha256)
    if cache.is_built(unit):
        cache.verify(unit)
    build(None)
    cache.verify(unit)
    cache.remove_leftovers()
    left = sorted(p.parent.name for p in directory.rglob("*") if p.is_file())
    assert left == ["shards", "units"], left

for kill_before in range(1000):
    shutil.rmtree(directory, ignore_errors=True)
    ended = child(lambda: build(kill_before))
    assert child(check) == 0, kill_before
    if ended == 0:
        break
    assert ended == -signal.SIGKILL, ended
print(kill_before)
"""


def test_killed_between_any_two_system_calls(plan, tmp_path):
    unit = json.dumps(next(plan.units()).to_json())
    process = subprocess.run(
        [
            sys.executable,
            "-c",
            KILLED_BETWEEN_CALLS,
            str(tmp_path / "killed"),
            str(plan.tokenizer.path),
            unit,
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) > 15
