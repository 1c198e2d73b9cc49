"""``eplb selftest`` as programs call it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

pytest.importorskip("torch")

from ep_ranks import refuse

from eplb.cli.main import cli
from eplb.errors import InvalidInput, ServingFailed
from eplb.runtime import selftest
from eplb.runtime.launch import num_processes, run_on_ranks


def invoke(*words):
    return cli.main([*words], standalone_mode=False)


def test_the_report_and_the_topology_file(tmp_path, capsys):
    path = tmp_path / "cluster.yaml"
    invoke("selftest", "--ranks", "4", "--nodes", "2", "--backend", "gloo", "--steps", "4",
           "--json", "--write-topology", str(path))  # fmt: skip
    result = json.loads(capsys.readouterr().out)
    assert (result["steps"], result["swaps"], result["tokens_lost"]) == (4, 1, 0)
    assert 0 < result["max_relative_error"] <= 1e-5
    assert result["tokens"] > 0
    written = yaml.safe_load(path.read_text())
    assert (written["num_nodes"], written["ranks_per_node"]) == (2, 2)
    assert written["intra_node_bytes_per_s"] > 1e6
    assert written["inter_node_bytes_per_s"] > 1e6


def test_options_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match=r"--ranks \(3\) must be divisible by --nodes \(2\)"):
        invoke("selftest", "--ranks", "3", "--nodes", "2", "--backend", "gloo")
    with pytest.raises(InvalidInput, match="--padded needs --exchange peers"):
        invoke("selftest", "--backend", "gloo", "--padded")
    with pytest.raises(InvalidInput, match="peer memory needs GPUs of one host"):
        invoke("selftest", "--backend", "gloo", "--ranks", "2", "--exchange", "peers")
    with pytest.raises(InvalidInput, match=r"the folder .* does not exist"):
        invoke("selftest", "--write-topology", str(tmp_path / "none" / "x.yaml"))


def test_processes_are_the_largest_divisor_there_is():
    assert [num_processes(n, "gloo") for n in (1, 4, 8, 9, 32, 144, 11)] == [1, 4, 8, 3, 8, 8, 1]


def test_an_error_of_a_process_is_ours():
    with pytest.raises(InvalidInput, match="process 1 says no"):
        run_on_ranks(refuse, None, num_ranks=2, backend="gloo", timeout_s=20.0)


def test_wrong_outputs_and_lost_pairs_are_failures(monkeypatch):
    report = selftest.Report(
        steps=1, swaps=0, max_relative_error=0.0, tokens_lost=0, tokens=1, moved_experts=0
    )
    settings = selftest.Settings(steps=1)
    for change in ({"max_relative_error": 1e-4}, {"max_relative_error": float("nan")},
                   {"tokens_lost": 1}):  # fmt: skip
        found = selftest.Report(**(report.to_dict() | change))
        with pytest.raises(ServingFailed, match="does not run the layer correctly"):
            selftest.check(found, settings)
    selftest.check(report, settings)


def test_torch_is_asked_for_where_it_is_missing():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from eplb.cli.main import main; main(['selftest'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "the runtime needs torch; pip install" in result.stderr
