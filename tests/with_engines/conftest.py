"""The engines' own modules, as released, loaded without what the tests do not need of them.

A wheel of an engine imports a whole inference stack. The modules about expert placement are few
and import little, so parents are made empty packages with the wheel's path, and what is left
(configuration, logging, platforms) is given by the tests.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import socket
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from eplb.cli.main import main
from eplb.model import model_preset
from eplb.placement.greedy import place_greedy
from eplb.plan import Plan
from eplb.slots import Placement
from eplb.topology import Topology


class Release:
    """An installed engine whose modules can be loaded one by one."""

    def __init__(self, name: str) -> None:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.submodule_search_locations is None:
            pytest.skip(f"needs the wheel of {name}: run `make test-engines`")
        self.name, self.path = name, Path(spec.submodule_search_locations[0])
        self.package(name)

    def package(self, name: str) -> None:
        """Make a package of the wheel empty: its submodules load, its __init__ does not run."""
        module = ModuleType(name)
        module.__path__ = [str(self.path.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module

    def give(self, name: str, **values) -> ModuleType:
        """Stand in for a module of the wheel."""
        module = ModuleType(name)
        module.__dict__.update(values)
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], last, module)
        return module

    def load(self, name: str) -> ModuleType:
        """Import a module of the wheel as it is."""
        return importlib.import_module(name)

    def text(self, path: str) -> str:
        """Return the source of a file of the wheel."""
        return (self.path / path).read_text()


@pytest.fixture(scope="module")
def release():
    """Load engines; what was loaded is forgotten after the module's tests."""
    yield Release
    for name in list(sys.modules):
        if name.partition(".")[0] in ("sglang", "vllm", "vllm_ascend"):
            del sys.modules[name]


def load_vllm() -> Release:
    """Return vLLM with what its expert placement asks of the rest."""
    vllm = Release("vllm")
    vllm.give("vllm.logger", init_logger=logging.getLogger, logger=logging.getLogger("vllm"))
    for name in ("config", "utils", "distributed", "distributed.device_communicators"):
        vllm.package(f"vllm.{name}")
    # The names of policies, as config/parallel.py has them: they must be those of the registry.
    names = re.search(
        r"^EPLBPolicyOption = (Literal\[.*\])$", vllm.text("config/parallel.py"), re.MULTILINE
    )
    assert names is not None
    vllm.give("vllm.config.parallel", EPLBPolicyOption=eval(names[1], {"Literal": Literal}))  # noqa: S307
    vllm.give("vllm.config.utils", compute_hash_cached=None)
    for name in ("ModelConfig", "ParallelConfig"):
        setattr(sys.modules["vllm.config"], name, object)
    distributed = "vllm.distributed."
    vllm.give(f"{distributed}nixl_utils", NixlWrapper=None)
    vllm.give(f"{distributed}device_communicators.pynccl", PyNcclCommunicator=object)
    vllm.give(f"{distributed}device_communicators.pynccl_wrapper", ncclDataTypeEnum=object)
    vllm.give(
        f"{distributed}parallel_state",
        **dict.fromkeys(("GroupCoordinator", "StatelessGroupCoordinator"), object),
        **dict.fromkeys(
            ("get_ep_group", "get_eplb_group", "get_node_count", "get_pp_group",
             "in_the_same_node_as"), None,
        ),
        is_local_first_rank=lambda: False,
    )  # fmt: skip
    vllm.give(f"{distributed}stateless_coordinator", StatelessGroupCoordinator=object)
    vllm.give(
        f"{distributed}utils", StatelessProcessGroup=object,
        is_weak_contiguous=lambda tensor: tensor.is_contiguous(),
    )  # fmt: skip
    for name in ("model_executor", "model_executor.models"):
        vllm.package(f"vllm.{name}")
    vllm.give("vllm.model_executor.models.interfaces", MixtureOfExperts=object)
    vllm.give("vllm.platforms", current_platform=None)
    vllm.give("vllm.utils.torch_utils", PIN_MEMORY=False)
    vllm.give("vllm.utils.gpu_sync_debug", gpu_sync_allowed=nullcontext)
    return vllm


@pytest.fixture(scope="module")
def vllm(release):
    """Return vLLM with what its expert placement asks of the rest."""
    return load_vllm()


@pytest.fixture
def plan():
    """Return a plan of DeepSeek-V3 with its layer of multi-token prediction, EP16x20."""
    return plan_of_layers((*range(3, 61), 61))


def plan_of_layers(layer_ids: tuple[int, ...], split: str = "even") -> Plan:
    """Return a greedy plan for skewed loads on 4 nodes of 4 ranks; some experts have replicas."""
    random = np.random.default_rng(3)
    load_LE = random.lognormal(0, 1, (len(layer_ids), 256)).astype(np.float32)
    rows_LS, _ = place_greedy(load_LE, num_slots=320, num_ranks=16, distinct_ranks=True)
    return Plan(
        model=replace(model_preset("deepseek-v3"), layer_ids=layer_ids),
        topology=Topology(num_nodes=4, ranks_per_node=4, slots_per_rank=20),
        placement=Placement(phys_to_log_LS=rows_LS, layer_ids=layer_ids, num_experts=256),
        split=split,
    )


def share_a_rank(row_S: NDArray[np.int64], slots_per_rank: int) -> tuple[int, int, int]:
    """Bring two replicas of an expert to one rank, in place; return expert and both slots."""
    expert = int(np.flatnonzero(np.bincount(row_S) == 2)[0])
    first, second = np.flatnonzero(row_S == expert)
    rank = first // slots_per_rank
    there = np.arange(rank * slots_per_rank, (rank + 1) * slots_per_rank)
    other = there[row_S[there] != expert][-1]
    row_S[second], row_S[other] = row_S[other], row_S[second]
    return expert, int(min(first, other)), int(max(first, other))


@pytest.fixture
def unused_port():
    """Return a port of this machine that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def eplb_command(capsys, monkeypatch, tmp_path):
    """Run ``eplb`` with words, in an empty folder; it has to succeed."""
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(line.split())
        captured = capsys.readouterr()
        assert not stop.value.code, captured.err
        return captured.out

    return run


def counts(windows: int, layers: int) -> NDArray[np.int64]:
    """Return loads of 256 experts, as an engine would count them."""
    random = np.random.default_rng(2)
    return random.poisson(random.lognormal(3, 1, (layers, 256)), (windows, layers, 256)) + 1


TOPOLOGY = "--model deepseek-v3 --nodes 4 --ranks-per-node 4 --slots-per-rank 20"
