"""The recorder on the CPU: counts, windows, options, and everything that can go wrong."""

from __future__ import annotations

import errno
import logging
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from eplb.errors import InvalidInput
from eplb.profiles import read_profile, read_routings

torch = pytest.importorskip("torch")

from eplb.profiles import recorder_writer  # noqa: E402
from eplb.profiles.recorder import Recorder, record  # noqa: E402
from eplb.profiles.recorder_counters import Counters  # noqa: E402


@pytest.fixture
def path(tmp_path):
    return tmp_path / "loads.npz"


def make(path, **more):
    options = {"num_experts": 4, "layer_ids": [3, 7], "every_steps": 1, **more}
    return Recorder(path, **options)


IDS = torch.tensor([[0, 1], [1, 2], [3, 1]])


@given(
    ids=arrays.arrays(np.int64, st.tuples(st.integers(0, 9), st.integers(1, 4)),
                      elements=st.integers(-3, 9)),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.int16]),
    seed=st.none() | st.integers(0, 99),
    phase=st.sampled_from(["prefill", "decode", "mixed"]),
)  # fmt: skip
def test_counts_are_what_counting_gives(tmp_path_factory, ids, dtype, seed, phase):
    path = tmp_path_factory.mktemp("counts") / "loads.npz"
    mask = None if seed is None else np.random.default_rng(seed).integers(0, 2, len(ids))
    with make(path, num_experts=6, layer_ids=[5]) as recorder:
        recorder.observe(
            5,
            torch.from_numpy(ids).to(dtype),
            None if mask is None else torch.from_numpy(mask),
            phase=phase,
        )
        recorder.observe(5, torch.tensor([[0]]), phase=phase)
    expected = np.zeros(6)
    expected[0] = 1
    for token, experts in enumerate(ids):
        for expert in experts:
            if 0 <= expert < 6 and (mask is None or mask[token]):
                expected[expert] += 1
    profile = read_profile(path)
    assert profile.counts_WLE.tolist() == [[expected.tolist()]]
    assert profile.phase_W == (phase,)


def test_layers_phases_and_windows_stay_apart(path):
    with make(path, every_steps=2) as recorder:
        for step in range(5):
            recorder.observe(3, IDS, phase="decode")
            recorder.observe(7, IDS[:2].flip(1), torch.tensor([True, False]), phase="decode")
            if step == 0:
                recorder.observe(3, IDS[:1], phase="prefill")
            recorder.step()
    profile = read_profile(path)
    assert profile.phase_W == ("prefill", "decode", "decode", "decode")
    assert profile.layer_ids == (3, 7)
    assert profile.counts_WLE[0].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert profile.counts_WLE[1].tolist() == [[2, 6, 2, 2], [2, 2, 0, 0]]
    assert profile.counts_WLE[3].tolist() == [[1, 3, 1, 1], [1, 1, 0, 0]]
    assert profile.tokens_W.tolist() == [1, 6, 6, 3]
    with np.load(path) as file:
        assert file["steps"].tolist() == [2, 2, 2, 1]


def test_shapes_that_engines_use(path):
    with make(path, layer_ids=[3]) as recorder:
        recorder.observe(3, torch.tensor([0, 1, 1]))  # top-1
        recorder.observe(3, IDS.view(1, 3, 2), torch.tensor([[1, 1, 0]]))
    assert read_profile(path).counts_WLE.tolist() == [[[2, 4, 1, 0]]]


def test_a_step_without_tokens_is_no_window(path):
    with make(path) as recorder:
        recorder.step()
        recorder.observe(3, IDS, torch.zeros(3))
        recorder.step()
        recorder.observe(3, IDS)
        recorder.observe(7, IDS)
        recorder.step()
    assert read_profile(path).num_windows == 1


def test_windows_of_seconds(path, monkeypatch):
    now = time.time()
    monkeypatch.setattr("eplb.profiles.recorder.time.time", lambda: now)
    recorder = Recorder(path, num_experts=4, layer_ids=[3], every_s=10)
    for _ in range(6):
        recorder.observe(3, IDS)
        now += 4
        recorder.step()
    recorder.close()
    profile = read_profile(path)
    assert profile.tokens_W.tolist() == [9, 6, 3]
    assert np.diff(profile.time_s_W) == pytest.approx([12, 8], abs=1)


def test_counters_may_wrap_around(path):
    recorder = make(path, layer_ids=[3])
    recorder._counters.counts_PLC.fill_(2**31 - 2)
    recorder.discard()
    for _ in range(3):
        recorder.observe(3, IDS)
        recorder.step()
    recorder.close()
    assert read_profile(path).counts_WLE.tolist() == [[[1, 3, 1, 1]]] * 3


def test_discard_forgets_the_open_window(path):
    with make(path, every_steps=10, layer_ids=[3]) as recorder:
        recorder.observe(3, IDS)
        recorder.discard()
        recorder.observe(3, IDS[:1])
    assert read_profile(path).counts_WLE.tolist() == [[[1, 1, 0, 0]]]


def test_a_scenario_ends_the_window(path):
    with make(path, every_steps=10, layer_ids=[3], scenario="day") as recorder:
        for name in ("day", "night"):
            recorder.scenario = name
            recorder.observe(3, IDS)
            recorder.step()
    profile = read_profile(path)
    assert profile.scenario_W == ("day", "night")
    assert recorder.scenario == "night"


def test_multi_token_prediction_is_kept_apart(path):
    with make(path, layer_ids=[3], mtp_layer_ids=[61]) as recorder:
        recorder.observe(3, IDS)
        recorder.observe(61, IDS[:1])
    assert read_profile(path).layer_ids == (3,)
    assert read_profile(f"{path}:mtp_counts").counts_WLE.tolist() == [[[1, 1, 0, 0]]]
    assert read_profile(f"{path}:mtp_counts").layer_ids == (61,)


def test_sampled_routings_are_choices_of_one_token(path):
    rng = np.random.default_rng(0)
    with make(path, num_experts=99, sample_tokens=3, every_steps=4, top_k=2) as recorder:
        for _ in range(8):
            first = torch.from_numpy(rng.integers(0, 49, (50, 2)))
            mask = torch.from_numpy(rng.integers(0, 2, 50))
            recorder.observe(3, first, mask)
            recorder.observe(7, first + 50, mask)
            recorder.step()
    routings = read_routings(path)
    assert routings.shape[1:] == (2, 2)
    assert 8 <= len(routings) <= 24
    assert np.array_equal(routings[:, 0] + 50, routings[:, 1])
    assert len(np.unique(routings[:, 0], axis=0)) > len(routings) // 2


def test_windows_are_called_back(path):
    seen = []
    with make(path, on_window=lambda phase, counts: seen.append((phase, counts.tolist()))) as r:
        r.observe(3, IDS, phase="decode")
        r.step()
    assert seen == [("decode", [[1, 3, 1, 1], [0, 0, 0, 0]])]


def test_a_callback_that_fails_loses_no_window(path, caplog):
    with make(path, layer_ids=[3], on_window=lambda *_: 1 / 0) as recorder:
        for _ in range(2):
            recorder.observe(3, IDS)
            recorder.step()
    assert read_profile(path).num_windows == 2
    assert "ZeroDivisionError" in caplog.text


def test_ids_beyond_the_experts_are_told(path, caplog):
    with make(path) as recorder:
        recorder.observe(3, torch.tensor([[0, 9], [4, 1]]))
        recorder.observe(7, torch.tensor([[0, -1], [-9, 1]]))
    profile = read_profile(path)
    assert profile.counts_WLE.tolist() == [[[1, 1, 0, 0]] * 2]
    assert "layer 3 was given expert ids at or above 4" in caplog.text
    assert "(2 in this window)" in caplog.text


def test_a_layer_that_reports_twice_is_told(path, caplog):
    with make(path) as recorder:
        for layer in (3, 3, 7):
            recorder.observe(layer, IDS)
    assert "layer 3 routed 2 times the tokens of others" in caplog.text


def test_a_silent_layer_is_told(path, caplog):
    with make(path) as recorder:
        recorder.observe(3, IDS)
    assert "layers [7] routed no token while others did" in caplog.text


def test_nothing_recorded_says_why_and_leaves_no_file(path, caplog):
    with make(path) as recorder:
        recorder.step()
    assert "1 steps came without tokens" in caplog.text
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer_ids": [3, 3]}, "3 is given twice"),
        ({"layer_ids": [3], "mtp_layer_ids": [3]}, "3 is given twice"),
        ({"layer_ids": []}, "no layer to record"),
        ({"layer_ids": [-1]}, "not negative"),
        ({"num_experts": 0}, "must be at least 1"),
        ({"every_steps": 0}, r"every_steps \(0\) must be greater than 0"),
        ({"every_s": 1.0}, "give one of them"),
        ({"sources": "rank"}, "give reduce=True"),
        ({"sources": "gpu", "reduce": True}, "unknown kind of source"),
        ({"sample_tokens": 1000}, "must be within 0 and 256"),
        ({"every_step": 3}, "did you mean 'every_steps'"),
        ({"metadata": {"x": object()}}, "must be JSON values"),
        ({"reduce": True}, "init_process_group first"),
    ],
)
def test_options_that_cannot_be_used(path, arguments, message):
    with pytest.raises(InvalidInput, match=message):
        make(path, **arguments)
    assert list(path.parent.iterdir()) == []


def test_a_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match=r"becomes a \.npz file"):
        make(tmp_path / "loads.csv")


@pytest.mark.parametrize(
    ("layer", "ids", "mask", "phase", "message"),
    [
        (4, IDS, None, "mixed", "layer id 4 is not recorded"),
        (3, IDS.float(), None, "mixed", "must be whole numbers"),
        (3, IDS, torch.ones(2), "mixed", "2 entries for 3 tokens"),
        (3, IDS, None, "decoding", "did you mean 'decode'"),
    ],
)
def test_observations_that_cannot_be_used(path, layer, ids, mask, phase, message):
    with make(path) as recorder:
        with pytest.raises(InvalidInput, match=message):
            recorder.observe(layer, ids, mask, phase=phase)
        recorder.observe(3, IDS)
        recorder.observe(7, IDS)


def test_after_closing_nothing_is_counted(path):
    recorder = make(path, layer_ids=[3])
    recorder.observe(3, IDS)
    recorder.close()
    recorder.close()
    recorder.observe(3, IDS)
    recorder.step()
    assert read_profile(path).counts_WLE.sum() == 6


def test_a_full_disk_keeps_windows_until_there_is_room(path, monkeypatch, caplog):
    class Full:
        full = True

        def append(self, record, append):
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            append(record)

    disk = Full()
    recorder = make(path, layer_ids=[3])
    append = recorder._writer._journal.append
    monkeypatch.setattr(
        recorder._writer._journal, "append", lambda record: disk.append(record, append)
    )
    for number in range(4):
        recorder.observe(3, IDS)
        recorder.step()
        if number == 2:
            while len(recorder._writer._backlog) < 3:
                time.sleep(0.005)
            disk.full = False
    recorder.close()
    assert read_profile(path).num_windows == 4
    assert caplog.text.count("No space left on device") == 1


def test_what_a_disk_never_takes_is_told(path, monkeypatch, caplog):
    monkeypatch.setattr(recorder_writer, "MAX_BACKLOG", 2)
    recorder = make(path, layer_ids=[3])

    def full(_record):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(recorder._writer._journal, "append", full)
    for _ in range(5):
        recorder.observe(3, IDS)
        recorder.step()
    recorder.close()
    assert "5 windows could not be written and are lost" in caplog.text


def test_windows_that_find_no_buffer_become_longer(path, monkeypatch, caplog):
    recorder = make(path, layer_ids=[3])
    release, taken = [], recorder._counters.take

    def slowly(pending):
        while not release:
            time.sleep(0.001)
        return taken(pending)

    monkeypatch.setattr(recorder._counters, "take", slowly)
    for _ in range(40):
        recorder.observe(3, IDS)
        recorder.step()
    release.append(True)
    recorder.close()
    profile = read_profile(path)
    assert profile.num_windows < 40
    assert profile.counts_WLE.sum(axis=0).tolist() == [[40, 120, 40, 40]]
    assert caplog.text.count("some become longer") == 1


def test_memory_on_the_device_is_what_is_promised():
    counters = Counters(1, 58, 256, 256, torch.device("cpu"))
    assert counters.device_bytes <= 1 << 20
    assert len(counters._free) == 15
    assert Counters(3, 58, 256, 256, torch.device("cpu")).device_bytes <= 1 << 20


def test_recorders_made_under_inference_mode_count_outside_of_it(path):
    with torch.inference_mode():
        recorder = make(path, layer_ids=[3])
        recorder.observe(3, IDS)
    recorder.observe(3, IDS)
    recorder.close()
    assert read_profile(path).counts_WLE.sum() == 12


def test_going_on_after_a_kill(path):
    recorder = make(path, layer_ids=[3])
    recorder.observe(3, IDS)
    recorder.step()
    while recorder._writer._queue.qsize() or len(recorder._counters._free) < 15:
        time.sleep(0.005)
        if len(recorder._counters._free) == len(recorder._counters._ring):
            break
    time.sleep(0.1)
    recorder._writer._journal.close()  # what a kill leaves: a journal that nobody holds
    with pytest.raises(InvalidInput, match="resume it"):
        make(path, layer_ids=[3])
    with make(path, layer_ids=[3], resume=True) as again:
        again.observe(3, IDS)
        again.step()
    assert read_profile(path).num_windows == 2
    recorder._closed = True
    logging.getLogger("eplb.recorder").debug("the first recorder is left as a killed one")


def test_record_needs_experts(path):
    with pytest.raises(InvalidInput, match=r"Linear has no mixture-of-experts layer"):
        record(torch.nn.Linear(2, 2), path)
    assert list(path.parent.iterdir()) == []
