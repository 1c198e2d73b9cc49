"""What each rank does when vLLM moves weights, on gloo: importable by the processes of a test."""

import torch
from with_engines.conftest import load_vllm

RANKS, SLOTS, EXPERTS, LAYERS, WIDTH = 4, 24, 16, 3, 5


def serve_rank(rank, old, new, port):
    """Hold the weights of the old placement, let vLLM move them, compare with the new one."""
    vllm = load_vllm()
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS
    )
    communicators = vllm.load("vllm.distributed.eplb.eplb_communicator")
    execute = vllm.load("vllm.distributed.eplb.rebalance_execute")

    class Stream:
        def synchronize(self):
            """CPU tensors are there when they are there."""

    torch.accelerator.current_stream = Stream
    per_rank = SLOTS // RANKS
    own = slice(rank * per_rank, (rank + 1) * per_rank)

    def weights(rows):
        # Two tensors a layer; every value tells layer and expert.
        value = rows[:, own, None].double() + 1000.0 * torch.arange(LAYERS)[:, None, None]
        return [[v.expand(-1, WIDTH).clone(), -v.expand(-1, 2).clone()] for v in value]

    held = weights(old)
    execute.rearrange_expert_weights_inplace(
        old, new, held, [torch.empty_like(w) for w in held[0]],
        torch.distributed.group.WORLD,
        communicators.TorchDistGlooStagedEplbCommunicator(torch.distributed.group.WORLD),
    )  # fmt: skip
    for layer, expected in zip(held, weights(new), strict=True):
        for have, want in zip(layer, expected, strict=True):
            assert torch.equal(have, want)
    torch.distributed.destroy_process_group()
