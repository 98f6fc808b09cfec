"""The output directory: nothing overwritten, nothing half visible, ordinary file modes."""

import fcntl
import os
import stat
from pathlib import Path

import pytest

from qconvert.errors import ConvertError
from qconvert.files import copy_file, write_file
from qconvert.journal import Header, Record
from qconvert.output import check_paths, partial_directory

HEADER = Header("1", "a plan", None, (), ("model.safetensors",), ("a.json", "sub/a.json"))


def test_the_directory_appears_whole_and_without_the_books(tmp_path: Path) -> None:
    with partial_directory(tmp_path / "out", HEADER) as partial:
        write_file(partial.path / "sub" / "a.json", [b"{}"])
        assert not (tmp_path / "out").exists()

    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "out",
        "out/sub",
        "out/sub/a.json",
    ]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_before_any_unit_leaves_nothing(
    tmp_path: Path, error: type[BaseException]
) -> None:
    def fail() -> None:
        with partial_directory(tmp_path / "out", HEADER) as partial:
            write_file(partial.path / "a.json", [b"{}"])
            raise error

    with pytest.raises(error):
        fail()

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_after_a_unit_keeps_it(tmp_path: Path, error: type[BaseException]) -> None:
    record = Record("key", (), ())

    def fail() -> None:
        with partial_directory(tmp_path / "out", HEADER) as partial:
            write_file(partial.path / "a.json", [b"{}"])
            partial.journal.append(record)
            raise error

    with pytest.raises(error):
        fail()

    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    with partial_directory(tmp_path / "out", HEADER) as partial:
        assert partial.before == [(tmp_path / "out.partial", {"key": record})]


def test_an_empty_output_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    with partial_directory(tmp_path / "out", HEADER) as partial:
        write_file(partial.path / "a.json", [b"{}"])

    assert (tmp_path / "out" / "a.json").read_bytes() == b"{}"


def test_an_output_that_filled_up_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def race() -> None:
        with partial_directory(tmp_path / "out", HEADER):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "precious").write_text("x")

    with pytest.raises(OSError, match="not empty"):
        race()

    assert (tmp_path / "out" / "precious").read_text() == "x"


def test_what_a_killed_run_left_without_a_journal_is_written_again(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    (partial / ".qconvert").mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"half")

    with partial_directory(tmp_path / "out", HEADER) as found:
        assert "its journal is missing or damaged; starting over" in found.notes[0]
        assert found.before == []


def test_what_a_run_left_that_was_killed_at_its_start_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()

    with partial_directory(tmp_path / "out", HEADER):
        pass

    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_mount_point_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "volume").mkdir()
    (tmp_path / "in").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "volume")

    with pytest.raises(ConvertError, match="is a mount point"):
        check_paths(tmp_path / "in", tmp_path / "volume")


def test_a_foreign_directory_of_that_name_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious").write_text("x")

    with (
        pytest.raises(ConvertError, match="was not made by qconvert"),
        partial_directory(tmp_path / "out", HEADER),
    ):
        pass

    assert (tmp_path / "out.partial" / "precious").read_text() == "x"


def test_a_failing_run_leaves_a_second_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first one clears its directory away, the lock is held; then it removes no file."""
    partial = tmp_path / "out.partial"
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        real(path, missing_ok)
        if path.name == "lock":
            # the second one begins here
            (partial / ".qconvert" / "lock").touch()
            (partial / "model.safetensors").write_text("second")

    def fail() -> None:
        with partial_directory(tmp_path / "out", HEADER) as found:
            (found.path / "model.safetensors").write_text("first")
            raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(ZeroDivisionError):
            fail()

    assert (partial / "model.safetensors").read_text() == "second"


def test_an_output_that_appeared_before_the_lock_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")

    with (
        pytest.raises(ConvertError, match="exists and is not empty"),
        partial_directory(tmp_path / "out", HEADER),
    ):
        pass

    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_books_that_are_a_link_are_not_ours(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("x")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / ".qconvert").symlink_to(tmp_path / "elsewhere")

    with (
        pytest.raises(ConvertError, match="was not made by qconvert"),
        partial_directory(tmp_path / "out", HEADER, fresh=True),
    ):
        pass

    assert (tmp_path / "elsewhere" / "precious").read_text() == "x"


def test_the_place_of_another_output_is_no_output_and_no_source(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out.partial" / ".qconvert").mkdir(parents=True)

    with pytest.raises(ConvertError, match="is what an interrupted conversion left"):
        check_paths(tmp_path / "in", tmp_path / "out.partial")
    with pytest.raises(ConvertError, match="give the output another name"):
        check_paths(tmp_path / "out.partial", tmp_path / "out")


def test_a_run_in_progress_is_not_disturbed(tmp_path: Path) -> None:
    (tmp_path / "out.partial" / ".qconvert").mkdir(parents=True)
    with open(tmp_path / "out.partial" / ".qconvert" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        with (
            pytest.raises(ConvertError, match="another conversion is writing it"),
            partial_directory(tmp_path / "out", HEADER),
        ):
            pass

    assert (tmp_path / "out.partial").exists()


def test_files_have_the_modes_of_the_umask(tmp_path: Path) -> None:
    source = tmp_path / "secret.json"
    source.write_bytes(b"{}")
    source.chmod(0o600)
    before = os.umask(0o022)
    try:
        copy_file(source, tmp_path / "copied")
        write_file(tmp_path / "written", [])
    finally:
        os.umask(before)

    for name in ("copied", "written"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o644


@pytest.mark.parametrize(
    ("source", "output", "problem"),
    [
        ("in", "in", "the same directory"),
        ("in", "link", "the same directory"),
        ("in", "in/out", "lies inside the input directory"),
        ("in/deep", "in", "lies inside the output directory"),
        ("in", "full", "exists and is not empty; nothing is overwritten"),
        ("in", "file", "exists and is not a directory"),
        ("in", "nowhere/out", "does not exist"),
    ],
)
def test_bad_paths_are_refused(tmp_path: Path, source: str, output: str, problem: str) -> None:
    for folder in ("in/deep", "full"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "full" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "in")

    with pytest.raises(ConvertError, match=problem):
        check_paths(tmp_path / source, tmp_path / output)
