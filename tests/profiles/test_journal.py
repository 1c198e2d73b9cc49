"""Appending windows: what a crash, a full disk or damage leaves behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb.errors import InvalidInput
from eplb.profiles import journal as journal_module
from eplb.profiles import read_profile, read_routings
from eplb.profiles.journal import Journal, read_records
from eplb.profiles.journal_file import export_journal
from eplb.profiles.live import Follower
from eplb.source import journal_path

HEADER = {
    "layer_ids": np.array([1, 3]),
    "metadata": np.array(json.dumps({"model": "toy"})),
}


def window(number, **more):
    rng = np.random.default_rng(number)
    return {
        "counts": rng.integers(1, 300 * (number + 1), (1, 2, 4)),
        "phase": np.array(["decode"]),
        "scenario": np.array(["default"]),
        "steps": np.array([5]),
        "time_s": np.array([1e9 + number]),
        "tokens": np.array([10 + number]),
        **more,
    }


def write(path, number, **more):
    journal = Journal(path, HEADER)
    for i in range(number):
        journal.append(window(i, **more))
    journal.close()
    return journal_path(path)


def counts(number):
    return np.concatenate([window(i)["counts"] for i in range(number)])


def test_a_journal_reads_under_the_name_of_its_profile(tmp_path):
    path = tmp_path / "loads.npz"
    journal = write(path, 3)
    for spec in (path, journal):
        profile = read_profile(spec)
        assert np.array_equal(profile.counts_WLE, counts(3))
        assert profile.layer_ids == (1, 3)
        assert profile.tokens_W.tolist() == [10, 11, 12]
        assert profile.metadata == {"model": "toy"}
    assert read_profile(path).source == "loads.npz"


def test_an_exported_profile_is_the_journal(tmp_path):
    path = tmp_path / "loads.npz"
    routings = np.full((2, 2, 2), -1, np.int16)
    journal = write(path, 5, routings=routings, mtp_counts=np.ones((1, 1, 4), int))
    before = read_profile(path)
    assert export_journal(journal, path) == 5
    journal.unlink()
    assert read_profile(path) == before
    with np.load(path) as file:
        assert file["counts"].dtype == np.uint16
        assert np.array_equal(file["routings"], np.concatenate([routings] * 5))
        assert file["mtp_counts"].shape == (5, 1, 4)
    assert read_profile(f"{path}:mtp_counts").num_windows == 5


def test_routings_are_read_from_a_journal_too(tmp_path):
    path = tmp_path / "loads.npz"
    write(path, 2, routings=np.ones((3, 2, 2), np.int16))
    assert read_routings(path).shape == (6, 2, 2)


@given(st.integers(0, 1 << 20), st.integers(0, 4))
def test_a_torn_end_costs_only_itself(tmp_path_factory, cut, number):
    path = tmp_path_factory.mktemp("torn") / "loads.npz"
    journal = write(path, number)
    ends = [end for end, _ in read_records(journal)]
    whole = journal.read_bytes()
    cut %= len(whole) + 1
    journal.write_bytes(whole[:cut])
    complete = sum(end <= cut for end in ends) - 1
    if complete > 0:
        assert np.array_equal(read_profile(path).counts_WLE, counts(complete))
    else:
        with pytest.raises(InvalidInput):
            read_profile(path)
    resumed = Journal(path, HEADER, resume=True)
    resumed.append(window(max(complete, 0)))
    resumed.close()
    assert np.array_equal(read_profile(path).counts_WLE, counts(max(complete, 0) + 1))


@given(st.binary(max_size=200))
def test_bytes_that_are_no_journal_are_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("bytes") / "x.npz.journal"
    path.write_bytes(data)
    with pytest.raises(InvalidInput):
        read_profile(path)


@given(st.data())
def test_damage_amid_records_is_told(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damage") / "loads.npz"
    journal = write(path, 3)
    ends = [end for end, _ in read_records(journal)]
    bad = bytearray(journal.read_bytes())
    # In the payload of the second window.
    at = data.draw(st.integers(ends[1] + 12, ends[2] - 1))
    bad[at] ^= 0xFF
    journal.write_bytes(bytes(bad))
    with pytest.warns(UserWarning, match="damaged"):
        list(read_records(journal))


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "loads.npz"
    journal = Journal(path, HEADER)
    with pytest.raises(InvalidInput, match="resume it"):
        Journal(path, HEADER)
    with pytest.raises(InvalidInput, match="another process records"):
        Journal(path, HEADER, resume=True)
    journal.close()
    path.touch()
    with pytest.raises(InvalidInput, match="exists; record to another file"):
        Journal(path, HEADER, resume=True)


def test_another_model_cannot_go_on(tmp_path):
    path = tmp_path / "loads.npz"
    write(path, 1)
    with pytest.raises(InvalidInput, match="another model"):
        Journal(path, {**HEADER, "layer_ids": np.array([1, 2])}, resume=True)


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "loads.npz"
    journal = Journal(path, HEADER)
    journal.append(window(0))
    pwrite = os.pwrite

    def full(file, data, offset):
        pwrite(file, data[:10], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal_module.os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        journal.append(window(1))
    assert np.array_equal(read_profile(path).counts_WLE, counts(1))
    monkeypatch.setattr(journal_module.os, "pwrite", pwrite)
    journal.append(window(1))
    journal.close()
    assert np.array_equal(read_profile(path).counts_WLE, counts(2))


def test_a_folder_that_is_missing_is_one_line(tmp_path):
    with pytest.raises(InvalidInput, match="create it first"):
        Journal(tmp_path / "no" / "loads.npz", HEADER)


CHILD = """
import sys, time
import torch
from eplb.profiles.recorder import Recorder
recorder = Recorder(sys.argv[1], num_experts=4, layer_ids=[0], every_steps=2)
for _ in range(7):
    recorder.observe(0, torch.tensor([[0, 1], [1, 2]]))
    recorder.step()
while recorder._writer._queue.qsize():
    time.sleep(0.01)
time.sleep(0.3)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_killed_process_loses_the_open_window_only(tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "loads.npz"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "ready\n"
    follower = Follower(path)
    assert len(follower.poll()) == 3
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    profile = read_profile(path)
    assert profile.counts_WLE.tolist() == [[[2, 4, 2, 0]]] * 3
    assert abs(profile.time_s_W[0] - time.time()) < 600


def test_following_a_recording(tmp_path):
    path = tmp_path / "loads.npz"
    with pytest.raises(InvalidInput, match="does not exist, nor is it being recorded"):
        Follower(path)
    journal = Journal(path, HEADER)
    follower = Follower(path)
    assert follower.poll() == []
    journal.append(window(0))
    journal.append(window(1))
    first, second = follower.poll()
    assert (first.drift, first.phase, first.tokens) == (None, "decode", 10)
    assert 0 < second.drift < 1
    skew = window(0)["counts"][0]
    assert first.max_over_mean == pytest.approx((skew.max(axis=1) / skew.mean(axis=1)).mean())
    assert first.worst_layer in {1, 3}
    assert follower.poll() == []
    journal.close()
    export_journal(journal.path, path)
    journal.path.unlink()
    assert follower.poll() == []
    assert follower.is_finished()
    assert len(Follower(path).poll()) == 2
