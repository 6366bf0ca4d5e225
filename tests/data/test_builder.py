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
        builders.append(plan.make_builder(plan.units(), num_workers))
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
        builder.build_all(lambda done, total: progress.append((done, total)))
    shards = list((plan.cache.directory / "shards").iterdir())
    assert len(shards) == len(list(plan.units())) == progress[-1][0] == progress[-1][1]
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
        "plan.make_builder(plan.units(), 2).build_all(lambda *_: print('.', flush=True))"
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


def test_an_old_failure_is_tried_again(plan, make_builder):
    bad = plan.sources[1].units[0]
    plan.cache.write_failure(bad, "the disk was full")
    make_builder().wait_for(bad)
    assert plan.cache.is_built(bad)


def test_a_worker_that_dies_is_replaced(plan):
    units = list(plan.units())
    worker = Worker(plan.cache.directory, plan.tokenizer.path)
    assert worker.build(units[0]) is None
    worker._process.send_signal(signal.SIGTERM)  # meant for training: ignored
    assert worker.build(units[1]) is None
    worker._process.kill()
    assert worker.build(units[2]) is None
    worker.stop()
    assert worker.build(units[3]) == "the builder is closed"


def test_a_worker_that_cannot_run_is_an_error_and_no_hang(plan):
    worker = Worker(plan.cache.directory, plan.cache.directory / "absent.json")
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
    builder = other.make_builder(other.units(), 1)
    builder.build_all(lambda *_: None)
    builder.close()
    assert {path.name: path.stat().st_mtime_ns for path in shards.iterdir()} == before
