"""The scripts behind docs/requests.md run, at sizes that show nothing but that."""

import calibrate_requests
import numpy as np
import pytest
import requests_peers
import torch

from eplb.profiles.request_trace import RequestTrace

CPU = torch.device("cpu")


def test_a_line_through_times_is_found():
    line = calibrate_requests.fitted([1e9, 2e9, 4e9], [1.5e-3, 2.5e-3, 4.5e-3])
    assert line["flops_per_s"] == pytest.approx(1e12)
    assert line["fixed_s"] == pytest.approx(0.5e-3)
    assert line["worst_relative_error"] < 1e-9


def test_calibration_runs_on_a_cpu():
    linear = calibrate_requests.linear(CPU, tiny=True)
    assert all(point["bf16_s"] > 0 for point in linear["points"])
    decode = calibrate_requests.decode_attention(CPU, tiny=True)
    assert all(point["relative_error"] < 1e-2 for point in decode["points"])
    prefill = calibrate_requests.prefill_attention(CPU, tiny=True)
    assert [point["pairs"] for point in prefill["points"]] == [16 * 17 / 2, 16 * 48]


def test_timings_of_a_small_trace():
    trace = RequestTrace(
        arrival_s_Q=np.arange(300.0),
        prompt_tokens_Q=np.random.default_rng(0).integers(1, 2000, 300),
        output_tokens_Q=np.full(300, 20),
    )
    found = requests_peers._assign(trace, 256)
    assert found["windows"] == 1
    assert found["tokens_over_bound"] >= 1
    assert found["gap_worst"] >= 0


def test_rounding_keeps_everything_else():
    value = {"a": [1.23456789, 2, "x", None], "b": {"c": 1e-9}}
    assert requests_peers._rounded(value) == {"a": [1.23457, 2, "x", None], "b": {"c": 1e-9}}
