from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import strategies as own
from hypothesis import assume, given
from hypothesis import strategies as st

from eplb.errors import InvalidInput
from eplb.load_profile import LoadProfile, merge_profiles

COUNTS_WLE = [[[1, 2], [3, 4]], [[5, 6], [7, 8]], [[9, 10], [11, 12]]]


def profile(counts: Any = COUNTS_WLE, **more: Any) -> LoadProfile:
    return LoadProfile.from_counts(counts, **more)


@pytest.mark.parametrize(
    ("counts", "more", "message"),
    [
        ([1, 2], {}, r"\[layers, experts\] or \[windows, layers, experts\].*1 dimension.*\[2\]"),
        (np.ones((2, 2, 2, 2)), {}, "4 dimension"),
        (np.ones((2, 0)), {}, r"each at least 1; got 2 dimension\(s\) of \[2, 0\]"),
        ([["a", "b"]], {}, "must be numbers, got <U1"),
        ([[1j, 2]], {}, "must be numbers, got complex128"),
        ([[1.0, np.nan]], {}, "NaN or infinite"),
        ([[1.0, np.inf]], {}, "NaN or infinite"),
        ([[1, -2]], {}, "negative values .least -2"),
        ([[1e301, 1]], {}, "above 1e300"),
        ([[0, 0], [0, 0]], {}, "all counts are zero"),
        (COUNTS_WLE, {"layer_ids": [3]}, "1 layer_ids for 2 layers"),
        (COUNTS_WLE, {"layer_ids": [4, 3]}, "strictly increasing, got 4, 3"),
        (COUNTS_WLE, {"layer_ids": [3, 3]}, "strictly increasing"),
        (COUNTS_WLE, {"layer_ids": [-1, 3]}, "non-negative"),
        (COUNTS_WLE, {"scenario": ["a", "b"]}, "2 scenario labels for 3 windows"),
        (COUNTS_WLE, {"phase": ["decode"]}, "1 phase labels for 3 windows"),
        (COUNTS_WLE, {"phase": "decoding"}, "unknown phase.*'decoding'; did you mean 'decode'"),
        (COUNTS_WLE, {"tokens": [1, 2]}, r"tokens must be 3 finite numbers.*got shape \[2\]"),
        (COUNTS_WLE, {"time_s": [0, 1, np.nan]}, "time_s must be 3 finite numbers"),
        (COUNTS_WLE, {"tokens": ["x", "y", "z"]}, "tokens must be numbers"),
    ],
)
def test_what_is_no_profile_is_said_with_its_source(
    counts: Any, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        profile(counts, source="f.npz", **more)
    assert "f.npz" in str(caught.value)


def test_a_layer_without_load_is_no_layer_of_a_profile() -> None:
    with pytest.raises(InvalidInput, match="layer 7 has no load in any window"):
        LoadProfile(
            counts_WLE=np.array([[[1.0, 1.0], [0.0, 0.0]]]),
            layer_ids=(3, 7),
            scenario_W=("a",),
            phase_W=("mixed",),
        )


def test_dense_layers_and_idle_windows_drop_out_and_the_rest_keep_their_labels() -> None:
    counts_WLE = np.zeros((4, 5, 3), dtype=np.uint16)
    counts_WLE[[0, 2, 3], 1] = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    counts_WLE[[0, 3], 4] = [[1, 0, 0], [0, 0, 65535]]
    found = profile(
        counts_WLE,
        layer_ids=[10, 11, 12, 13, 20],
        scenario=["a", "idle", "b", "c"],
        phase=["prefill", "mixed", "decode", "mixed"],
        tokens=[1, 2, 3, 4],
        time_s=[0.5, 1.5, 2.5, 3.5],
    )
    assert found.layer_ids == (11, 20)
    assert found.scenario_W == ("a", "b", "c")
    assert found.phase_W == ("prefill", "decode", "mixed")
    assert found.tokens_W.tolist() == [1, 3, 4]
    assert found.time_s_W.tolist() == [0.5, 2.5, 3.5]
    assert found.counts_WLE.tolist() == counts_WLE[[0, 2, 3]][:, [1, 4]].tolist()


def test_two_dimensions_are_one_window_and_ids_count_from_zero() -> None:
    found = profile([[0, 0], [1, 2]])
    assert (found.num_windows, found.num_layers, found.num_experts) == (1, 1, 2)
    assert found.layer_ids == (1,)
    assert (found.scenario_W, found.phase_W) == (("default",), ("mixed",))


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "int64", "float16", "float32"])
def test_counts_of_every_dtype_are_read_without_a_warning(dtype: str) -> None:
    assert profile(np.ones((1, 2), dtype)).counts_WLE.tolist() == [[[1, 1]]]


def test_arrays_are_copies_and_read_only() -> None:
    counts_WLE = np.ones((1, 1, 2))
    found = profile(counts_WLE)
    counts_WLE[:] = 5
    assert found.counts_WLE.tolist() == [[[1, 1]]]
    with pytest.raises(ValueError, match="read-only"):
        found.counts_WLE[0, 0, 0] = 2


@given(own.profiles())
def test_a_profile_built_from_its_own_parts_is_equal(given_profile: LoadProfile) -> None:
    again = profile(
        given_profile.counts_WLE,
        layer_ids=given_profile.layer_ids,
        scenario=given_profile.scenario_W,
        phase=given_profile.phase_W,
        tokens=given_profile.tokens_W,
        time_s=given_profile.time_s_W,
    )
    kept = given_profile.counts_WLE.any(axis=(1, 2))
    assert again.num_windows == kept.sum()
    if kept.all():
        assert again == given_profile
        assert again.sha256() == given_profile.sha256()


@given(own.profiles(idle=False))
def test_mean_load_gives_every_window_the_same_weight(given_profile: LoadProfile) -> None:
    mean_LE = given_profile.mean_load_LE()
    if given_profile.num_windows == 1:
        assert (mean_LE == given_profile.counts_WLE[0]).all()
        return
    for layer in range(given_profile.num_layers):
        windows = given_profile.counts_WLE[:, layer].tolist()
        expected = [
            sum(load_E[e] / sum(load_E) for load_E in windows) / len(windows)
            for e in range(given_profile.num_experts)
        ]
        assert mean_LE[layer] == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_mean_load_leaves_out_windows_in_which_a_layer_was_idle() -> None:
    found = profile([[[1, 3], [2, 0]], [[0, 0], [0, 6]]]).mean_load_LE()
    assert found.tolist() == [[0.25, 0.75], [0.5, 0.5]]


@given(own.profiles(), st.integers(-5, 5) | st.none(), st.integers(-5, 5) | st.none())
def test_windows_count_as_slices_do(
    given_profile: LoadProfile, start: int | None, stop: int | None
) -> None:
    part_WLE = given_profile.counts_WLE[start:stop]
    assume(part_WLE.any())
    found = given_profile.windows(start, stop)
    used_W, used_L = part_WLE.any(axis=(1, 2)), part_WLE.any(axis=(0, 2))
    assert (found.counts_WLE == part_WLE[used_W][:, used_L]).all()
    labels = zip(given_profile.scenario_W[start:stop], used_W, strict=True)
    assert found.scenario_W == tuple(label for label, used in labels if used)
    assert set(found.layer_ids) <= set(given_profile.layer_ids)


def test_no_window_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="windows 3: of 3 are empty; choose within 0:3"):
        profile().windows(3, None)


def test_of_scenario_takes_its_windows_and_names_the_nearest_of_an_unknown_one() -> None:
    found = profile(scenario=["day", "night", "day"])
    assert found.scenarios == ("day", "night")
    assert found.of_scenario("day").counts_WLE.tolist() == [COUNTS_WLE[0], COUNTS_WLE[2]]
    with pytest.raises(InvalidInput, match="unknown scenario 'nigth'; did you mean 'night'"):
        found.of_scenario("nigth")


def test_the_digest_never_changes() -> None:
    """Plans name the profile they were fitted to by it."""
    found = profile([[1, 2], [3, 4]], layer_ids=[3, 5], scenario="day", phase="decode")
    digest = "63cb3337409e566616789cb28f77c655233268048cddce315e9f2d5c71d38eb6"
    assert found.sha256() == digest
    assert replace(found, source="elsewhere", metadata={"who": "me"}).sha256() == digest


@given(own.profiles(), st.data())
def test_the_digest_covers_every_count_and_label(given_profile: LoadProfile, data: Any) -> None:
    counts_WLE = given_profile.counts_WLE.copy()
    cell = tuple(data.draw(st.integers(0, n - 1)) for n in counts_WLE.shape)
    counts_WLE[cell] = np.nextafter(counts_WLE[cell], np.inf) if counts_WLE[cell] else 1.0
    window = cell[0]
    phases = list(given_profile.phase_W)
    phases[window] = "decode" if phases[window] != "decode" else "prefill"
    scenarios = list(given_profile.scenario_W)
    scenarios[window] += "+"
    ids = (*given_profile.layer_ids[:-1], given_profile.layer_ids[-1] + 1)
    others = [
        replace(given_profile, counts_WLE=counts_WLE),
        replace(given_profile, phase_W=phases),
        replace(given_profile, scenario_W=scenarios),
        replace(given_profile, layer_ids=ids),
    ]
    digests = {other.sha256() for other in (given_profile, *others)}
    assert len(digests) == 5
    assert all(other != given_profile for other in others)


def test_the_digest_tells_shapes_apart() -> None:
    flat = [1, 2, 3, 4, 5, 6, 7, 8]
    shapes = [(1, 1, 8), (1, 2, 4), (2, 1, 4), (2, 2, 2), (4, 1, 2), (4, 2, 1)]
    assert len({profile(np.reshape(flat, shape)).sha256() for shape in shapes}) == len(shapes)


def test_merging_names_scenarios_after_files_and_keeps_named_ones() -> None:
    merged = merge_profiles(
        [
            profile(source="a.npz"),
            profile(source="a.npz"),
            profile(scenario=["x", "y", "x"], source="b.npz"),
        ]
    )
    assert merged.scenarios == ("a.npz", "a.npz#2", "x", "y")
    assert merged.num_windows == 9
    assert merged.source == "a.npz, a.npz, b.npz"
    assert merged.metadata == {"merged_from": ["a.npz", "a.npz", "b.npz"]}


def test_merging_keeps_tokens_only_where_all_have_them() -> None:
    with_tokens = profile(tokens=[1, 2, 3], source="a")
    assert merge_profiles([with_tokens, with_tokens]).tokens_W.tolist() == [1, 2, 3, 1, 2, 3]
    assert merge_profiles([with_tokens, profile(source="b")]).tokens_W is None


def test_one_profile_merges_to_itself() -> None:
    one = profile()
    assert merge_profiles(iter([one])) is one


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (profile(np.ones((1, 2, 3)), source="b.npz"), "b.npz has 3 experts, a.npz has 2"),
        (profile(layer_ids=[0, 5], source="b.npz"), r"b.npz and a.npz disagree.*ids 1, 5 are in"),
    ],
)
def test_profiles_of_different_models_do_not_merge(other: LoadProfile, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        merge_profiles([profile(source="a.npz"), other])


def test_nothing_does_not_merge() -> None:
    with pytest.raises(InvalidInput, match="no profile given"):
        merge_profiles([])


@given(own.profiles(num_experts=4), st.integers(2, 4))
def test_merged_windows_are_those_of_the_parts_in_order(
    given_profile: LoadProfile, times: int
) -> None:
    merged = merge_profiles([given_profile] * times)
    assert (merged.counts_WLE == np.concatenate([given_profile.counts_WLE] * times)).all()
    assert merged.phase_W == given_profile.phase_W * times
    assert merged.scenarios == given_profile.scenarios


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([[1, 2], [3]], "rows of different length"),
        ([["1", "2"]], "must be numbers"),
        ([[1j, 2]], "must be numbers"),
        ([[5e-324, 1.0]], "below 1e-300"),
        ([[1e301, 1.0]], "above 1e300"),
        (np.ones((2, 0)), r"2 dimension\(s\) of \[2, 0\]"),
    ],
)
def test_counts_that_are_none_are_refused(counts: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        LoadProfile.from_counts(counts)


@pytest.mark.parametrize("ids", [["3", "4"], [0.5, 1.5], [True, 2], [4, 3], [-1, 2]])
def test_layer_ids_that_are_none_are_refused(ids: Any) -> None:
    with pytest.raises(InvalidInput, match="layer_ids must be"):
        LoadProfile.from_counts(np.ones((2, 4)), layer_ids=ids)


def test_zeros_of_either_sign_have_one_digest() -> None:
    plus, minus = (LoadProfile.from_counts([[z, 1.0]]) for z in (0.0, -0.0))
    assert plus == minus
    assert plus.sha256() == minus.sha256()


def test_a_file_named_like_a_scenario_becomes_another_scenario() -> None:
    named = LoadProfile.from_counts([[1, 2]], scenario="x", source="a")
    default = LoadProfile.from_counts([[3, 4]], source="x")
    assert merge_profiles([named, default]).scenarios == ("x", "x#2")
    assert merge_profiles([default, named]).scenarios == ("x#2", "x")


def test_narrow_floats_are_read_without_a_warning() -> None:
    for dtype in (np.float16, np.float32):
        assert LoadProfile.from_counts(np.ones((2, 3), dtype)).num_experts == 3
