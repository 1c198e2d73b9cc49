"""Request traces: formats, broken lines, clocks that go back, samples from statistics."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb.errors import EplbError, InvalidInput
from eplb.profiles.request_trace import RequestTrace
from eplb.profiles.servegen import sample_servegen
from eplb.profiles.trace_files import read_trace

PLAIN = "arrival_s,prompt_tokens,output_tokens,more\n0.5,10,3,x\n1.5,20,4,y\n"


def written(folder, name, text):
    path = folder / name
    path.write_text(text)
    return path


def test_plain_csv_with_further_columns(tmp_path):
    trace = read_trace(written(tmp_path, "a.csv", PLAIN))
    assert trace.arrival_s_Q.tolist() == [0.0, 1.0]
    assert trace.prompt_tokens_Q.tolist() == [10, 20]
    assert trace.output_tokens_Q.tolist() == [3, 4]
    assert trace.notes == ()
    assert not trace.has_blocks


def test_columns_in_any_order_and_compressed(tmp_path):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"output_tokens,arrival_s,prompt_tokens\n3,0,10\n"))
    assert read_trace(path).prompt_tokens_Q.tolist() == [10]


def test_azure_csv(tmp_path):
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    )
    trace = read_trace(written(tmp_path, "azure.csv", text))
    assert trace.arrival_s_Q[1] == pytest.approx(4.314579)
    assert trace.output_tokens_Q.tolist() == [44, 109]


def test_mooncake_jsonl(tmp_path):
    rows = [
        {"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [3, 4]},
        {"timestamp": 2500, "input_length": 600, "output_length": 6, "hash_ids": [3]},
    ]
    trace = read_trace(written(tmp_path, "m.jsonl", "\n".join(map(json.dumps, rows))))
    assert trace.arrival_s_Q.tolist() == [0.0, 2.5]
    assert trace.blocks(0).tolist() == [3, 4]
    assert trace.blocks(1).tolist() == [3]


def test_unreadable_lines_are_left_out_counted_and_named(tmp_path):
    text = PLAIN + "2,0,5,z\nx,1,1,\n3,7,8,\n4\n"
    trace = read_trace(written(tmp_path, "a.csv", text))
    assert trace.num_requests == 3
    (note,) = trace.notes
    assert note.startswith("3 unreadable lines left out: line 4 (0 tokens), line 5 (")
    assert "line 7" in note


def test_too_many_unreadable_lines_are_refused(tmp_path):
    path = written(tmp_path, "a.csv", PLAIN + "bad,1,1,\n" * 6)
    with pytest.raises(InvalidInput, match=r"6 of 8 lines are not requests: line 4 .* at most 5"):
        read_trace(path)
    assert read_trace(path, max_bad_lines=6).num_requests == 2
    with pytest.raises(InvalidInput, match="at most 0"):
        read_trace(path, max_bad_lines=0)


def test_a_clock_that_goes_back_is_said_and_put_right(tmp_path):
    text = PLAIN + "1.0,30,5,\n"
    trace = read_trace(written(tmp_path, "a.csv", text))
    assert trace.prompt_tokens_Q.tolist() == [10, 30, 20]
    assert "the clock goes back 1 times" in trace.notes[0]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "prompt_tokens,output_tokens\n1,2\n", "a trace needs arrival_s"),
        ("a.csv", "arrival_s,prompt_tokens,output_tokens\n", "there are none"),
        ("a.jsonl", "{}\n", "not requests"),
        ("a.jsonl", '{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": "x"}\n',
         "hash_ids"),
        ("a.txt", "1\n", "not a request trace"),
        ("a.csv", "arrival_s,prompt_tokens,output_tokens\nnan,1,1\n", "is not a time"),
        ("a.csv", f"arrival_s,prompt_tokens,output_tokens\n0,{1 << 40},1\n", "tokens"),
    ],
)  # fmt: skip
def test_what_is_no_trace_is_refused_in_a_line(tmp_path, name, text, words):
    with pytest.raises(InvalidInput, match=words) as error:
        read_trace(written(tmp_path, name, text))
    assert "\n" not in str(error.value)


def trace_or_line(path):
    """The trace, or the one line that says why there is none."""
    try:
        return read_trace(path)
    except EplbError as error:
        return str(error)


@given(data=st.binary(min_size=1, max_size=200), name=st.sampled_from(["f.csv", "f.jsonl.gz"]))
def test_any_bytes_give_a_trace_or_one_line(tmp_path_factory, data, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data)
    found = trace_or_line(path)
    assert found.num_requests > 0 if isinstance(found, RequestTrace) else "\n" not in found


CELL = st.one_of(st.integers(-5, 5).map(str), st.floats().map(str), st.text(max_size=5))


@given(cells=st.lists(st.lists(CELL, max_size=4), max_size=6))
def test_any_cells_give_a_trace_or_one_line(tmp_path_factory, cells):
    path = tmp_path_factory.getbasetemp() / "cells.csv"
    lines = [",".join(row) for row in cells]
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "\n".join(lines))
    found = trace_or_line(path)
    if isinstance(found, RequestTrace):
        assert (np.diff(found.arrival_s_Q) >= 0).all()
    else:
        assert "\n" not in found


def servegen_folder(folder, rate="2.0"):
    rows = ["client,window_start_s,rate_rps,cv,pattern,p1,p2"]
    rows += [f"{c},{w},{rate},1.5,{p},0.7,1" for c, p in ((0, "Gamma"), (1, "Weibull"))
             for w in (0, 600)]  # fmt: skip
    (folder / "client_rates.csv.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    table = {}
    for name, lengths in (("input_tokens", [10, 20]), ("output_tokens", [300, 0])):
        table[f"{name}_client"] = np.array([0, 0, 1, 1])
        table[f"{name}_window"] = np.zeros(4, int)
        table[f"{name}_len"] = np.array(lengths * 2)
        table[f"{name}_prob"] = np.array([0.5, 0.5, 1.0, 0.0])
    np.savez(folder / "length_pmfs.npz", **table)
    return folder


def test_a_sample_has_the_published_statistics(tmp_path):
    folder = servegen_folder(tmp_path)
    trace = sample_servegen(folder, start_s=0, duration_s=1200, seed=1)
    assert trace.num_requests == pytest.approx(4 * 1200, rel=0.25)
    assert set(trace.prompt_tokens_Q.tolist()) == {10, 20}
    assert set(trace.output_tokens_Q.tolist()) == {300, 1}
    again = sample_servegen(folder, start_s=0, duration_s=1200, seed=1)
    assert again.arrival_s_Q.tobytes() == trace.arrival_s_Q.tobytes()
    with pytest.raises(InvalidInput, match="no request arrives"):
        sample_servegen(folder, start_s=90_000)


def test_a_folder_without_statistics_is_named(tmp_path):
    with pytest.raises(InvalidInput, match=r"client_rates\.csv\.gz does not exist"):
        sample_servegen(tmp_path)


def test_traces_that_contradict_themselves_are_refused():
    one = np.ones(1, int)
    with pytest.raises(InvalidInput, match="no requests"):
        RequestTrace(arrival_s_Q=[], prompt_tokens_Q=[], output_tokens_Q=[])
    with pytest.raises(InvalidInput, match="equally many"):
        RequestTrace(arrival_s_Q=[0.0], prompt_tokens_Q=one, output_tokens_Q=[1, 2])
    with pytest.raises(InvalidInput, match="not fall"):
        RequestTrace(arrival_s_Q=[2.0, 1.0], prompt_tokens_Q=[1, 1], output_tokens_Q=[1, 1])


def test_the_recorded_traces_are_read(shared_data):
    for name in ("azure2023_code.csv", "mooncake_synthetic_trace.jsonl.gz"):
        trace = read_trace(shared_data / "requests" / name)
        assert trace.num_requests > 3000
        assert trace.notes == ()
