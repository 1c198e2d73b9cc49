"""Bad input: one line with the remedy, an exit code, and nothing written."""

import contextlib
import os
import pickle
import pty
import re
import subprocess
import sys
import zipfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

NODES = ("--nodes", "2", "--ranks-per-node", "2", "--slots-per-rank", "5")


class Bomb:
    """Unpickled naively, this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def make_bad_files(folder):
    good = np.random.default_rng(0).integers(1, 9, (3, 16))
    np.savez(folder / "good.npz", counts=good)
    (folder / "empty.npz").touch()
    (folder / "folder.npz").mkdir()
    whole = (folder / "good.npz").read_bytes()
    (folder / "truncated.npz").write_bytes(whole[: len(whole) // 2])
    np.save(folder / "object.npy", np.array([[1, {}]], object), allow_pickle=True)
    np.save(folder / "one-dimension.npy", np.ones(5))
    np.save(folder / "negative.npy", good - 5)
    for name, value in (("nan", np.nan), ("infinite", np.inf)):
        bad = good.astype(float)
        bad[0, 0] = value
        np.save(folder / f"{name}.npy", bad)
    np.save(folder / "zero.npy", good * 0)
    np.save(folder / "other-layers.npy", np.vstack([good, good]))
    np.save(folder / "other-experts.npy", good[:, :8])
    (folder / "ragged.csv").write_text("1,2,3\n4,5\n")
    (folder / "words.csv").write_text("1,2,3\n4,five,6\n")
    with zipfile.ZipFile(folder / "bomb.pt", "w") as archive:
        archive.writestr("bomb/data.pkl", pickle.dumps({"logical_count": Bomb(folder / "boom")}))
    (folder / "loads.parquet").write_text("PAR1")


PROFILES = [
    ("missing.npz", "does not exist; check the path"),
    ("folder.npz", "is a directory; name a profile file"),
    ("empty.npz", "is empty; record again"),
    ("truncated.npz", "is not a readable .npz"),
    ("bomb.pt", "asks for pathlib.* which is not run"),
    ("object.npy", "is not a readable .npy"),
    ("one-dimension.npy", r"must be \[layers, experts\] or \[windows, layers, experts\]"),
    ("negative.npy", "negative values"),
    ("nan.npy", "NaN or infinite"),
    ("infinite.npy", "NaN or infinite"),
    ("zero.npy", "all counts are zero"),
    ("ragged.csv", "line 2: 2 cells where line 1 has 3"),
    ("words.csv", "line 2: 'five' is not a number"),
    (
        "loads.parquet",
        "unknown profile format .*known: .csv, .journal, .json, .jsonl, .npy, .npz, .pt",
    ),
    ("good.npz:count", "unknown array in good.npz: 'count'; did you mean 'counts'"),
]


def refused(run, code, pattern, *args):
    """Run, and see one line of error, the exit code, and an unchanged folder."""
    before = sorted(Path().iterdir())
    result = run(*args)
    assert result.out == ""
    assert result.err.startswith("eplb: error: ")
    assert result.err.count("\n") == 1, result.err
    assert result.code == code, result.err
    assert re.search(pattern, result.err), result.err
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(("name", "pattern"), PROFILES)
def test_profiles(run, tmp_path, name, pattern):
    make_bad_files(tmp_path)
    refused(run, 2, pattern, "plan", name, *NODES, "-o", "plan.yaml")
    refused(run, 2, pattern, "profile", "show", name)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("other-layers.npy", "disagree on the layers"), ("other-experts.npy", "8 experts.*has 16")],
)
def test_profiles_that_disagree(run, tmp_path, name, pattern):
    make_bad_files(tmp_path)
    refused(run, 2, pattern, "plan", "good.npz", name, *NODES, "-o", "plan.yaml")


@pytest.mark.parametrize(
    ("code", "pattern", "options"),
    [
        (3, "use --slots-per-rank 4 or more", "--nodes 2 --ranks-per-node 2 --slots-per-rank 3"),
        (3, "more replicas than ranks", "--nodes 1 --ranks-per-node 2 --slots-per-rank 20"),
        (2, "0 is not in the range", "--nodes 0 --ranks-per-node 2 --slots-per-rank 9"),
        (2, "not a valid integer", "--nodes 2 --ranks-per-node 2.5 --slots-per-rank 9"),
        (2, "--slots-per-rank is missing", "--nodes 2 --ranks-per-node 2"),
        (2, "--ranks-per-node is missing", "--nodes 2 --slots-per-rank 9"),
        (2, "over the limit", "--nodes 99999 --ranks-per-node 9999 --slots-per-rank 9"),
        (2, "does not divide the 16", f"{' '.join(NODES)} --groups 5"),
        (2, "needs the number of routing groups", f"{' '.join(NODES)} --hierarchical"),
        (2, "use 1 nodes", ("--nodes 2 --ranks-per-node 2 --slots-per-rank 5 --hierarchical "
            "--groups 1")),
        (2, "did you mean 'even'", f"{' '.join(NODES)} --split evn"),
        (2, "did you mean 'greedy'", f"{' '.join(NODES)} --solver gredy"),
        (2, "did you mean 'mean'", f"{' '.join(NODES)} --objective meen"),
        (2, "did you mean 'deepseek-v3'", f"{' '.join(NODES)} --model deepseek-v33"),
        (2, "did you mean 'h800'", f"{' '.join(NODES)} --topology h80"),
        (2, "has no experts|has 16 experts", f"{' '.join(NODES)} --model deepseek-v3"),
        (2, "not a range of windows", f"{' '.join(NODES)} --windows 3"),
        (2, "are empty; choose within 0:1", f"{' '.join(NODES)} --windows 5:"),
        (2, "No such option '--slot-per-rank'", f"{' '.join(NODES)} --slot-per-rank 3"),
    ],
)  # fmt: skip
def test_options(run, tmp_path, code, pattern, options):
    make_bad_files(tmp_path)
    refused(run, code, pattern, "plan", "good.npz", *options.split(), "-o", "plan.yaml")


@pytest.mark.parametrize(
    ("output", "pattern"),
    [
        ("no/such/folder/plan.yaml", "does not exist; create it first"),
        ("folder.npz", "not a regular file"),
        ("good.npz/plan.yaml", "does not exist|not a"),
    ],
)
def test_outputs(run, tmp_path, output, pattern):
    make_bad_files(tmp_path)
    refused(run, 2, pattern, "plan", "good.npz", *NODES, "-o", output)
    refused(run, 2, pattern, "profile", "convert", "good.npz", "-o", output)
    refused(run, 2, pattern, "demo", "-o", output)


def test_a_failed_plan_leaves_the_old_one(run, tmp_path):
    make_bad_files(tmp_path)
    run("plan", "good.npz", *NODES, "-o", "plan.yaml")
    old = Path("plan.yaml").read_bytes()
    refused(run, 2, "negative", "plan", "negative.npy", *NODES, "-o", "plan.yaml")
    assert Path("plan.yaml").read_bytes() == old


@pytest.mark.parametrize(
    ("change", "code", "pattern"),
    [
        (lambda text: text.replace("eplb/plan@1", "eplb/plan@9"), 2, "this version reads"),
        (lambda text: text.replace("num_nodes: 2", "num_nodes: 1"), 2, "digest"),
        (lambda text: "- a list\n", 2, "is not a plan"),
        (lambda text: text[: len(text) // 2], 2, "plan.yaml"),
        (lambda text: "", 2, "is empty"),
    ],
)
def test_plans(run, tmp_path, change, code, pattern):
    make_bad_files(tmp_path)
    run("plan", "good.npz", *NODES, "-o", "plan.yaml")
    Path("plan.yaml").write_text(change(Path("plan.yaml").read_text()))
    refused(run, code, pattern, "evaluate", "plan.yaml", "good.npz")


def test_a_profile_of_another_model(run, tmp_path):
    make_bad_files(tmp_path)
    run("plan", "good.npz", *NODES, "-o", "plan.yaml")
    refused(run, 2, "8 experts", "evaluate", "plan.yaml", "other-experts.npy")
    refused(run, 6, "layer 3 has load", "evaluate", "plan.yaml", "other-layers.npy")


def test_no_command_shows_the_help(run):
    result = run()
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("Usage: eplb [OPTIONS] COMMAND")
    assert "\n  plan " in result.err


def test_names_from_files_are_shown_as_they_are(run, tmp_path):
    """Neither as markup, nor to be obeyed by the terminal."""
    counts = np.random.default_rng(0).integers(1, 9, (2, 3, 16))
    np.savez("odd[x].npz", counts=counts, scenario=["[/]", "a\x1b[31m\nb"])
    assert run("plan", "odd[x].npz", *NODES, "-o", "plan.yaml").code == 0
    for command in (("evaluate", "plan.yaml"), ("profile", "show")):
        result = run(*command, "odd[x].npz")
        assert (result.code, result.err) == (0, "")
        assert "odd[x].npz: 2 windows" in result.out
        assert "[/] " in result.out
        assert r"a\x1b[31m\nb" in result.out
        assert "\x1b" not in result.out


def test_unknown_command(run):
    refused(run, 2, "did you mean 'plan'", "plam")


def test_debug_adds_a_traceback(run):
    result = run("--debug", "profile", "show", "missing.npz")
    assert result.code == 2
    assert "Traceback" in result.err


def test_a_bug_of_ours_is_one_line_too(run, monkeypatch):
    monkeypatch.setattr("eplb.cli.versions.platform.platform", lambda: 1 / 0)
    result = run("versions")
    assert result.code == 1
    assert result.err.startswith("eplb: error: internal error: ZeroDivisionError")
    assert result.err.count("\n") == 1


def eplb_process(*args, **settings):
    code = "from eplb.cli.main import main; main()"
    environment = {**os.environ, **settings.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True, check=False, env=environment, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_gets_whole_figures(tmp_path, width):
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", "from eplb.cli.main import main; main(['demo'])"],
        stdout=follower, stderr=subprocess.PIPE, cwd=tmp_path,
        env={**os.environ, "COLUMNS": str(width), "TERM": "xterm", "NO_COLOR": "1"},
    )  # fmt: skip
    os.close(follower)
    written = b""
    # Reading a terminal that everybody else has closed fails.
    with contextlib.suppress(OSError):
        while part := os.read(leader, 4096):
            written += part
    os.close(leader)
    assert process.communicate()[1] == b""
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", written.decode())
    assert "\u2026" not in text
    assert "1.422   1.140   1.000   \u2581" in text
    assert max(map(len, text.splitlines())) <= width


def test_forty_columns_hold_the_figures(tmp_path):
    sample = files("eplb.profiles") / "data" / "sample.npz"
    topology = ["--nodes", "4", "--ranks-per-node", "8", "--slots-per-rank", "9", "-o", "plan.yaml"]
    for words in (
        ["plan", str(sample), *topology],
        ["evaluate", "plan.yaml", str(sample)],
        ["profile", "show", str(sample)],
    ):
        code = (
            "import sys; sys.stdout.isatty = lambda: True; "
            "from eplb.cli.main import main; main(sys.argv[1:])"
        )
        result = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, check=True,
            env={**os.environ, "COLUMNS": "40", "PYTHONIOENCODING": "utf-8", "NO_COLOR": "1"},
        )  # fmt: skip
        text = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout.decode())
        assert "\u2026" not in text
        assert max(map(len, text.splitlines())) <= 40
        assert re.search(r"^7 .* \d\.\d+ ", text, re.MULTILINE)


def test_a_pipe_gets_plain_text(tmp_path):
    result = eplb_process("demo", cwd=tmp_path, env={"PYTHONIOENCODING": "utf-8"})
    assert result.returncode == 0
    assert b"\x1b" not in result.stdout
    assert "\u2584" in result.stdout.decode()


def test_an_ascii_terminal_gets_digits(tmp_path):
    result = eplb_process("demo", cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert (result.returncode, result.stderr) == (0, b"")
    assert "444444" in result.stdout.decode("ascii")


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_closed_pipe_is_no_error(tmp_path, options):
    reader, writer = os.pipe()
    os.close(reader)
    code = "from eplb.cli.main import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "demo", *options],
        stdout=writer, stderr=subprocess.PIPE, check=False, cwd=tmp_path,
    )  # fmt: skip
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")


def test_closed_output_is_no_error(tmp_path):
    code = "from eplb.cli.main import main; main(['demo'])"
    result = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "{code}" >&-'],
        stderr=subprocess.PIPE, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, b"")
    assert (tmp_path / "demo-plan.yaml").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_behind_the_output_is_one_line(tmp_path):
    code = "from eplb.cli.main import main; main()"
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-c", code, "versions", "--json"],
            stdout=full, stderr=subprocess.PIPE, check=False, cwd=tmp_path,
        )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith(b"eplb: error: cannot write the output: No space")
    assert result.stderr.count(b"\n") == 1
