"""Files that are complete at any moment."""

import json
import os
import subprocess
import sys

import pytest

from empathic.files import FolderInUseError, atomic_path, clean_path, held_folder, write_json, write_text


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"one": "é"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"one": "é"}
    write_json(path, [1], indent=None)
    assert path.read_text() == "[1]\n" and list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="half"), atomic_path(path) as partial:
        partial.write_text("new, but")
        raise RuntimeError("half way")
    with pytest.raises(TypeError):
        write_json(path, {"not": object()})
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_until_the_end_the_old_file_is_there(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with atomic_path(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old" and partial.name.startswith("a.txt.") and partial.suffix == ".part"
    assert path.read_text() == "new"


def test_a_path_is_taken_as_people_write_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("my clip.mp4", "'odd'", "back\\slash"):
        (tmp_path / name).write_text("")
    assert {clean_path(text) for text in ('"my clip.mp4"', " 'my clip.mp4' ", "my\\ clip.mp4")} == {"my clip.mp4"}
    assert clean_path("~/my clip.mp4") == clean_path('"~/my clip.mp4"') == f"{tmp_path}/my clip.mp4"
    # What is there is meant.
    assert [clean_path(name) for name in ("'odd'", "back\\slash", "me/model", "new\\ file")] == [
        "'odd'", "back\\slash", "me/model", "new\\ file"
    ]  # fmt: skip


HOLD = """
import sys, time
from empathic.files import FolderInUseError, atomic_path, held_folder, write_json, write_text
with held_folder(sys.argv[1], "empathic train"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()


def test_a_folder_in_use_names_who_uses_it(holder, tmp_path):
    with (
        pytest.raises(FolderInUseError, match=rf"process {holder.pid} on .*empathic train"),
        held_folder(tmp_path / "out", "empathic train"),
    ):
        pass
    with held_folder(tmp_path / "out", "empathic evaluate emotion", ".emotion.lock"):  # another lock
        pass


def test_a_killed_process_holds_nothing(holder, tmp_path):
    holder.kill()
    holder.wait()
    assert (tmp_path / "out" / ".lock").exists()
    with held_folder(tmp_path / "out", "empathic train"):
        assert json.loads((tmp_path / "out" / ".lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_worker_that_outlives_its_parent_does_not_hold_the_folder(tmp_path):
    fork = "import os; ends = os.pipe()\n    if os.fork() == 0:\n        os.write(ends[1], b'.'); time.sleep(20)\n"
    code = HOLD.replace("    print(", f"    {fork}    os.read(ends[0], 1)\n    print(")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.wait()
    with held_folder(tmp_path, "empathic train"):
        pass


def test_a_folder_is_free_afterwards_and_left_as_it_was(tmp_path):
    for error in (None, RuntimeError):
        try:
            with held_folder(tmp_path / "a" / "b", "x"):
                assert (tmp_path / "a" / "b" / ".lock").exists()
                if error:
                    raise error
        except RuntimeError:
            pass
        assert not (tmp_path / "a").exists()  # nothing was written
    with held_folder(tmp_path / "a", "x"):
        (tmp_path / "a" / "result").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["result"]
    with (
        pytest.raises(NotADirectoryError, match=r"is a file\. Choose another"),
        held_folder(tmp_path / "a" / "result", "x"),
    ):
        pass
