"""On a GPU: captured graphs, compiled models, and nothing that waits for the device."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from families import VOCABULARY, tiny_model  # noqa: E402

from eplb.profiles import read_profile  # noqa: E402
from eplb.profiles.recorder import Recorder, record  # noqa: E402

DEVICE = "cuda"


def batches(number=6):
    torch.manual_seed(1)
    mask = torch.ones(4, 8, dtype=torch.long, device=DEVICE)
    mask[0, :3] = 0
    return [torch.randint(3, VOCABULARY, (4, 8), device=DEVICE) for _ in range(number)], mask


def model():
    torch.manual_seed(0)
    return tiny_model("qwen3_moe").to(DEVICE, torch.bfloat16)


@torch.no_grad()
def recorded(path, run, tokens, mask):
    with record(run, path, every_steps=2) as recorder:
        for ids in tokens:
            run(input_ids=ids, attention_mask=mask, use_cache=False)
    assert recorder.device_bytes < 1 << 20
    return read_profile(path)


def test_compiled_models_count_the_same(tmp_path):
    tokens, mask = batches()
    plain = recorded(tmp_path / "a.npz", model(), tokens, mask)
    for mode in ("default", "reduce-overhead"):
        torch.compiler.reset()
        compiled = torch.compile(model(), mode=mode)
        seen = recorded(tmp_path / f"{mode}.npz", compiled, tokens, mask)
        assert seen.num_windows == plain.num_windows == 3
        # Kernels differ, and with them a few choices near a tie; the number of tokens does not.
        assert np.array_equal(seen.counts_WLE.sum(axis=2), plain.counts_WLE.sum(axis=2))
        moved = np.abs(seen.counts_WLE - plain.counts_WLE).sum() / plain.counts_WLE.sum()
        assert moved < 0.1


@torch.no_grad()
def test_a_captured_graph_counts_at_each_replay(tmp_path):
    tokens, _ = batches()
    graphed = model()
    ids = tokens[0].clone()
    with record(graphed, tmp_path / "graph.npz", every_steps=1) as recorder:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            graphed(input_ids=ids, use_cache=False)
        torch.cuda.current_stream().wait_stream(side)
        recorder.discard()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graphed(input_ids=ids, use_cache=False)
        for batch in tokens:
            ids.copy_(batch)
            graph.replay()
            recorder.step()
    with record(graphed, tmp_path / "eager.npz", every_steps=1):
        for batch in tokens:
            graphed(input_ids=batch, use_cache=False)
    seen, plain = read_profile(tmp_path / "graph.npz"), read_profile(tmp_path / "eager.npz")
    assert np.array_equal(seen.counts_WLE[-6:], plain.counts_WLE)


def test_nothing_waits_for_the_device(tmp_path):
    layers, experts, top_k = 58, 256, 8
    ids = torch.stack([torch.randperm(experts, device=DEVICE)[:top_k] for _ in range(128)])
    mask = torch.ones(128, device=DEVICE, dtype=torch.bool)
    mask[100:] = False
    with Recorder(
        tmp_path / "x.npz", num_experts=experts, layer_ids=range(3, 61), device=DEVICE,
        every_steps=3, sample_tokens=8,
    ) as recorder:  # fmt: skip
        recorder.observe(3, ids, mask)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(30):
                for layer in range(3, 61):
                    recorder.observe(layer, ids.int(), mask)
                recorder.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    profile = read_profile(tmp_path / "x.npz")
    expected = 30 * np.bincount(ids[:100].flatten().cpu(), minlength=experts)
    for layer in range(1, layers):
        assert np.array_equal(profile.counts_WLE.sum(axis=0)[layer], expected)


def test_the_profiler_sees_no_wait(tmp_path):
    from torch.profiler import ProfilerActivity, profile

    ids = torch.randint(256, (128, 8), device=DEVICE)
    waits = {}
    with Recorder(
        tmp_path / "x.npz", num_experts=256, layer_ids=range(58), device=DEVICE, every_steps=2
    ) as recorder:
        for steps in (0, 10):
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                for _ in range(steps):
                    for layer in range(58):
                        recorder.observe(layer, ids)
                    recorder.step()
            # Leaving the block waits for the device by itself, as often with steps as without.
            waits[steps] = sum(
                event.count for event in profiler.key_averages() if "Synchronize" in event.key
            )
    assert waits[10] == waits[0]


def test_ids_that_are_no_expert_leave_the_model_running(tmp_path, caplog):
    bad = torch.tensor([[0, 1], [2, 9], [-1, -1], [-7, 3]], device=DEVICE)
    with Recorder(tmp_path / "x.npz", num_experts=4, layer_ids=[0], device=DEVICE) as recorder:
        recorder.observe(0, bad)
        recorder.step()
    assert read_profile(tmp_path / "x.npz").counts_WLE.tolist() == [[[1, 1, 1, 1]]]
    assert "at or above 4" in caplog.text
    torch.cuda.synchronize()
