"""The output folder is replaced as a whole or not at all, whatever ends the run."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from surgery.core import locked_folder, remove_abandoned, scratch_folder
from surgery.core.scratch import LOCK
from surgery.delivery import saving as artefacts
from surgery.errors import InvalidInput


def write_set(out: Path, text: str) -> None:
    with artefacts.output_set(out) as folder:
        (folder / artefacts.PLAN).write_text(text)


def contents(out: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in out.iterdir()}


def neighbours(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path != out)


def child_in_the_middle(out: Path) -> subprocess.Popen[str]:
    """Start a run that has written half of its files and waits."""
    code = f"""
        import sys, time
        from surgery.delivery import saving as artefacts
        with artefacts.output_set({str(out)!r}) as folder:
            (folder / artefacts.PLAN).write_text("half")
            print("ready", flush=True)
            time.sleep(60)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    return child


def test_a_finished_block_becomes_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "new" / "net"
    write_set(out, "first")
    assert contents(out) == {"plan.json": "first"}
    assert neighbours(out) == []


def test_a_second_set_replaces_the_first_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "net"
    write_set(out, "first")
    with artefacts.output_set(out) as folder:
        (folder / "report.json").write_text("second")
        assert contents(out) == {"plan.json": "first"}
    assert contents(out) == {"report.json": "second"}
    assert neighbours(out) == []


def test_the_folder_is_readable_by_others_as_any_new_folder_is(tmp_path: Path) -> None:
    write_set(tmp_path / "net", "first")
    ordinary = tmp_path / "ordinary"
    ordinary.mkdir()
    assert (tmp_path / "net").stat().st_mode == ordinary.stat().st_mode


@pytest.mark.parametrize("error", [ValueError("export failed"), KeyboardInterrupt()])
def test_a_failing_block_leaves_the_previous_set(tmp_path: Path, error: BaseException) -> None:
    out = tmp_path / "net"
    write_set(out, "first")
    with pytest.raises(type(error)), artefacts.output_set(out) as folder:
        (folder / artefacts.PLAN).write_text("half")
        raise error
    assert contents(out) == {"plan.json": "first"}
    assert neighbours(out) == []


def test_a_killed_run_leaves_the_previous_set_and_the_next_run_clears_its_leftovers(tmp_path: Path) -> None:
    out = tmp_path / "net"
    write_set(out, "first")
    child = child_in_the_middle(out)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert contents(out) == {"plan.json": "first"}
    assert len(neighbours(out)) == 1
    write_set(out, "second")
    assert contents(out) == {"plan.json": "second"}
    assert neighbours(out) == []


def test_a_living_neighbour_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "net"
    child = child_in_the_middle(out)
    try:
        write_set(out, "first")
        assert len(neighbours(out)) == 1
    finally:
        child.kill()
        child.wait()


def test_a_set_that_a_killed_run_had_moved_aside_is_put_back(tmp_path: Path) -> None:
    out = tmp_path / "net"
    write_set(out, "first")
    (tmp_path / ".net.partial-abc").mkdir()
    (tmp_path / ".net.partial-abc" / LOCK).touch()
    out.rename(tmp_path / ".net.partial-abc" / ".previous")
    assert artefacts.prepare(out) == out
    assert contents(out) == {"plan.json": "first"}
    assert neighbours(out) == []


def test_files_of_the_users_are_refused_not_removed(tmp_path: Path) -> None:
    out = tmp_path / "net"
    write_set(out, "first")
    (out / "finetuned.pt").write_text("a week of work")
    with pytest.raises(InvalidInput, match=r"finetuned\.pt"):
        write_set(out, "second")
    assert contents(out) == {"plan.json": "first", "finetuned.pt": "a week of work"}


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="cannot be written"):
        artefacts.prepare(tmp_path / "file" / "net")
    with pytest.raises(InvalidInput, match="is a file"):
        artefacts.prepare(tmp_path / "file")


def test_the_current_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInput, match="name a folder inside it"):
        artefacts.prepare(".")


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    out = tmp_path / "net"
    with pytest.raises(InvalidInput, match="No space left"), artefacts.output_set(out):
        raise OSError(28, "No space left on device")
    assert not out.exists()


def test_other_errors_of_the_system_are_not_disguised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), artefacts.output_set(tmp_path / "net"):
        (tmp_path / "absent").read_text()


def test_only_remains_of_the_same_folder_are_cleared(tmp_path: Path) -> None:
    for out in (tmp_path / "out1", tmp_path / "out[0-9]"):
        with child_in_the_middle(out) as child:
            child.kill()
    write_set(tmp_path / "out[0-9]", "first")
    assert len(neighbours(tmp_path / "out[0-9]")) == 1
    assert neighbours(tmp_path / "out[0-9]")[0].startswith(".out1.partial-")


def test_folders_called_like_a_file_of_the_set_are_the_users(tmp_path: Path) -> None:
    out, mine = tmp_path / "net", tmp_path / "net" / "plan.json" / "mine"
    mine.parent.mkdir(parents=True)
    mine.touch()
    with pytest.raises(InvalidInput, match=r"holds plan\.json"):
        write_set(out, "first")
    assert mine.exists()


@pytest.mark.parametrize("name", ["loop", "loop/net", "~nobody-of-this-name/net", "/"])
def test_paths_that_lead_nowhere_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InvalidInput, match=r"--out .*(cannot be written|cannot be replaced)"):
        artefacts.prepare(name)


def test_runs_that_start_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    def write(k: int) -> str:
        for _ in range(20):
            with locked_folder(tmp_path, ".net.partial-") as folder:
                (folder / "file").write_text(str(k))
                remove_abandoned(tmp_path, ".net.partial-")
                assert (folder / "file").read_text() == str(k)
        return "whole"

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(write, range(4))) == {"whole"}
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_between_the_two_steps_of_replacing_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "net", Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        found = rename(path, target)
        if target.name == ".previous":
            raise KeyboardInterrupt
        return found

    write_set(out, "first")
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_set(out, "second")
    assert contents(out) == {"plan.json": "first"}
    assert neighbours(out) == []


def test_scratch_of_killed_processes_is_cleared_and_folders_of_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "surgery-experiments").mkdir()
    (tmp_path / "surgery-dead").mkdir()
    (tmp_path / "surgery-dead" / LOCK).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / LOCK).touch()
    (tmp_path / "surgery-link").symlink_to("elsewhere")
    with scratch_folder() as alive, scratch_folder():
        assert alive.is_dir()
        assert not (tmp_path / "surgery-dead").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "surgery-experiments", "surgery-link"]
    assert (tmp_path / "elsewhere" / LOCK).exists()
