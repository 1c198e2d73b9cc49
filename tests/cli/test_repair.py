"""repair on the command line, and topology files in options."""

import json

from eplb.plan_file import read_plan


def planned(run, loads, small, *more):
    assert run("plan", loads / "day.npz", *small, *more, "-o", "plan.yaml").code == 0


def test_a_rank_dies(run, loads, small):
    planned(run, loads, small)
    done = run(
        "repair", "plan.yaml", loads / "day.npz", "--dead-ranks", "1", "-o", "r.yaml", "--json",
        "--topology", "h800",
    )  # fmt: skip
    assert done.code == 3
    assert "eplb resize" in done.err
    wider = (*small[:-1], 8)
    planned(run, loads, wider)
    done = run(
        "repair", "plan.yaml", loads / "day.npz", "--dead-ranks", "1", "-o", "r.yaml", "--json",
        "--topology", "h800", "--max-moves", 3,
    )  # fmt: skip
    report = json.loads(done.out)
    plan = read_plan("r.yaml")
    assert plan.digest() == report["digest"]
    assert plan.topology.ranks_out_of_service == (1,)
    assert report["lost_experts"] == report["min_lost_experts"] == len(report["lost"])
    assert report["moved_experts"] <= 3
    assert report["bandwidths"] == "preset h800"
    for place in report["lost"]:
        row = plan.placement.layer_ids.index(place["layer"])
        assert plan.placement.phys_to_log_LS[row, place["slot"]] == place["expert"]
        assert place["slot"] // plan.topology.slots_per_rank == place["rank"]
    shown = run("repair", "plan.yaml", "--dead-nodes", "1", "-o", "r.yaml")
    assert shown.code == 0
    assert "2 ranks out of service" in shown.out
    assert read_plan("r.yaml").topology.ranks_out_of_service == (2, 3)
    # What is repaired can be scored, compared and planned from.
    assert run("evaluate", "r.yaml", loads / "night.npz", "--json").code == 0
    assert json.loads(run("diff", "r.yaml", "r.yaml", "--json").out)["moved_experts"] == 0


def test_what_cannot_be_repaired(run, loads, small):
    planned(run, loads, small)
    for options, code, words in (
        ((), 2, "nothing died"),
        (("--dead-ranks", "4"), 2, "rank 4 does not exist"),
        (("--dead-nodes", "7"), 2, "node 7 does not exist"),
        (("--dead-ranks", "3-1"), 2, "no list of numbers"),
        (("--dead-ranks", "1,,2"), 2, "no list of numbers"),
        (("--dead-ranks", "0-3"), 3, "no rank is left"),
        (("--dead-ranks", "1", "--max-moves", "1"), 3, "resize"),
    ):
        done = run("repair", "plan.yaml", *options, "-o", "r.yaml")
        assert (done.code, words in done.err) == (code, True), done.err


def test_a_topology_file_gives_counts_and_bandwidths(run, loads, tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "num_nodes: 2\nranks_per_node: 2\nslots_per_rank: 9\nintra_node_bytes_per_s: 1e9\n"
        "inter_node_bytes_per_s: 1.0e+8\nranks_out_of_service: [3]\n"
    )
    done = run("plan", loads / "day.npz", "--topology", file, "-o", "plan.yaml", "--json")
    assert done.code == 0, done.err
    plan = read_plan("plan.yaml")
    assert plan.topology.ranks_out_of_service == (3,)
    assert plan.topology.intra_node_bytes_per_s == 1e9
    done = run("plan", loads / "day.npz", "--topology", file, "--nodes", 3, "-o", "x.yaml")
    assert done.code == 2
    assert "num_nodes is 2 and 3 was asked for" in done.err
    run("plan", loads / "night.npz", "--topology", file, "-o", "other.yaml")
    report = json.loads(
        run("diff", "plan.yaml", "other.yaml", "--topology", file, "--expert-bytes", 10**6,
            "--json").out
    )  # fmt: skip
    assert report["bandwidths"]["source"] == f"file {file}"
    assert report["seconds"] > 0
    assert run("plan", loads / "day.npz", "--topology", "no.yaml", "-o", "x.yaml").code == 2
    assert (
        "did you mean"
        in run("plan", loads / "day.npz", "--topology", "h80", "--nodes", 2, "-o", "x.yaml").err
    )


def test_resize_there_and_back(run, loads, small):
    planned(run, loads, small)
    done = run(
        "resize", "plan.yaml", loads / "day.npz", "--nodes", 1, "--slots-per-rank", 10,
        "--spare-slots", 1, "--topology", "h800", "--time-limit", 0.5, "-o", "night.yaml",
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    report = json.loads(done.out)
    plan = read_plan("night.yaml")
    assert plan.digest() == report["digest"]
    assert plan.topology.label == report["to"] == "EP2x10"
    assert report["forced_experts"] <= report["moved_experts"]
    assert report["staging_slots"] <= 1
    scored = json.loads(run("evaluate", "night.yaml", loads / "day.npz", "--json").out)
    assert abs(scored["imbalance_mean"] - report["imbalance"]) < 1e-9
    shown = run("resize", "night.yaml", loads / "day.npz", *small, "--solver", "greedy",
                "-o", "day.yaml")  # fmt: skip
    assert shown.code == 0, shown.err
    assert "EP2x10 to EP4x5" in shown.out
    diff = json.loads(run("diff", "plan.yaml", "night.yaml", "--spare-slots", 1, "--json").out)
    assert diff["moved_experts"] == report["moved_experts"]
    assert diff["staging_slots"] <= 1
    assert diff["batches"] >= 1


def test_what_cannot_be_resized(run, loads, small):
    planned(run, loads, small)
    day = loads / "day.npz"
    for options, code, words in (
        ((), 2, "nothing changes"),
        (("--nodes", 1), 3, "--slots-per-rank 8"),
        (("--back-in-service", 1), 2, "rank 1 is not out of service"),
        (("--nodes", 1, "--slots-per-rank", 8, "--max-moves", 0), 3, "use --max-moves"),
        (("--nodes", 3, "--topology", "none.yaml"), 2, "does not exist"),
    ):
        done = run("resize", "plan.yaml", day, *options, "--solver", "greedy", "-o", "r.yaml")
        assert (done.code, words in done.err) == (code, True), done.err


def test_ranks_that_differ_are_not_resized_to_any_number(run, loads, tmp_path):
    (tmp_path / "c.yaml").write_text(
        "num_nodes: 2\nranks_per_node: 2\nslots_per_rank: 6\nrank_speed: [1, 1, 1, 0.5]\n"
    )
    day = loads / "day.npz"
    assert run("plan", day, "--topology", tmp_path / "c.yaml", "-o", "plan.yaml").code == 0
    for options in (("--nodes", 3), ("--slots-per-rank", 7)):
        done = run("resize", "plan.yaml", day, *options, "-o", "r.yaml")
        assert (done.code, "equal slots and speed" in done.err) == (2, True), done.err


def test_a_plan_without_a_rank_is_shown_with_what_engines_would_start_with(run, loads, tmp_path):
    (tmp_path / "c.yaml").write_text(
        "num_nodes: 2\nranks_per_node: 2\nslots_per_rank: 6\nranks_out_of_service: [0]\n"
    )
    done = run("plan", loads / "day.npz", "--topology", tmp_path / "c.yaml", "--holdout", "50%",
               "-o", "plan.yaml")  # fmt: skip
    assert done.code == 0, done.err
    assert "18 slots a layer, 2 redundant" in done.out
