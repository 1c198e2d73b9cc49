from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from eplb.errors import InvalidInput
from eplb.files import check_writable, write_atomic


def test_a_new_file_holds_the_data_with_the_mode_of_the_process(tmp_path: Path) -> None:
    target = tmp_path / "plan.yaml"
    write_atomic(target, b"data")
    assert target.read_bytes() == b"data"
    (tmp_path / "ordinary").touch()
    assert target.stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    assert {p.name for p in tmp_path.iterdir()} == {"plan.yaml", "ordinary"}


def test_permissions_of_the_file_replaced_are_kept(tmp_path: Path) -> None:
    target = tmp_path / "plan.yaml"
    target.write_bytes(b"old")
    target.chmod(0o640)
    write_atomic(str(target), b"new")
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_symlink_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "plan.yaml"
    target.write_bytes(b"old")
    link = tmp_path / "link.yaml"
    link.symlink_to(target)
    write_atomic(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert check_writable(link) == target


@pytest.mark.parametrize("step", ["fsync", "fchmod"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_crash_in_the_middle_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    target = tmp_path / "plan.yaml"
    target.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, step, fail)
    expected = InvalidInput if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match=r"No space left|^$"):
        write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_rename_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "plan.yaml"
    target.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(InvalidInput, match="Input/output error"):
        write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("write", [check_writable, lambda path: write_atomic(path, b"data")])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/plan.yaml", "the folder .*missing does not exist; create it first"),
        ("folder", "not a regular file"),
        ("file/plan.yaml", "the folder .*file does not exist"),
    ],
)
def test_an_unwritable_place_is_named_with_the_remedy(
    tmp_path: Path, write, name: str, reason: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InvalidInput, match=f"cannot write .*{name}.*{reason}"):
        write(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_asking_changes_nothing(tmp_path: Path) -> None:
    assert check_writable(tmp_path / "plan.yaml") == tmp_path / "plan.yaml"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x" * 300, "nul\0byte"])
def test_a_name_no_file_system_takes_is_invalid_input(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="cannot write"):
        write_atomic(str(tmp_path / name), b"data")
    assert not list(tmp_path.iterdir())
