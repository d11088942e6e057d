"""Unpacking of good and bad archives: what is unpacked, what is refused, and that no file is written outside."""

import io
import os
import tarfile
import zipfile

import pytest

from empathic.data_prep import archives
from empathic.data_prep.archives import unpack
from empathic.data_prep.corpora.base import LayoutError, Report

FILES = {"a/one.wav": b"one", "a/b/two.wav": b"two" * 70000, "three.csv": b"x,y\n"}


def write_tar(path, files, mode="w:gz", extra=()):
    """Write a tar file. files: name -> content; extra: further `TarInfo` without content."""
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1_500_000_000
            tar.addfile(info, io.BytesIO(content))
        for info in extra:
            tar.addfile(info)
    return path


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in files.items():
            packed.writestr(zipfile.ZipInfo(name, (2017, 7, 14, 2, 40, 0)), content)
    return path


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def lines(report):
    return {entry["item"]: entry["reason"] for entry in report.ignored}


@pytest.mark.parametrize("name", ["c.tar.gz", "c.tgz", "c.tar", "c.tar.xz", "c.zip"])
def test_unpacks_each_format_once(tmp_path, name, monkeypatch):
    modes = {".tar": "w", ".xz": "w:xz"}
    path = tmp_path / name
    write_zip(path, FILES) if name.endswith("zip") else write_tar(path, FILES, modes.get(path.suffix, "w:gz"))
    report = Report("x")
    folder = unpack(path, tmp_path / "into", report)
    assert folder == tmp_path / "into" / "c" and tree(folder) == FILES and report.ignored == []
    assert (folder / "a/one.wav").stat().st_mtime == 1_500_000_000  # the time in the archive, equal on every machine
    assert sorted(p.name for p in (tmp_path / "into").iterdir()) == [".c.unpacked", "c"]
    before = (folder / "a/one.wav").stat().st_ino
    monkeypatch.setattr(archives, "_extract", lambda *args: pytest.fail("unpacked again"))
    assert unpack(path, tmp_path / "into", report) == folder
    assert (folder / "a/one.wav").stat().st_ino == before


def test_a_changed_archive_is_unpacked_anew(tmp_path):
    report = Report("x")
    folder = unpack(write_zip(tmp_path / "c.zip", FILES), tmp_path / "into", report)
    unpack(write_zip(tmp_path / "c.zip", {"new.wav": b"n"}), tmp_path / "into", report)
    assert tree(folder) == {"new.wav": b"n"}
    (tmp_path / "other").mkdir()
    other = write_zip(tmp_path / "other" / "c.zip", FILES)
    with pytest.raises(LayoutError, match="have the same name"):
        unpack(other, tmp_path / "into", report)
    (tmp_path / "c.zip").unlink()  # the archive was moved; it is not a second archive
    assert tree(unpack(other, tmp_path / "into", report)) == FILES


def test_no_member_lands_outside(tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    device = tarfile.TarInfo("null")
    device.type, device.devmajor, device.devminor = tarfile.CHRTYPE, 1, 3
    fifo = tarfile.TarInfo("pipe")
    fifo.type = tarfile.FIFOTYPE
    evil = {"../outside.txt": b"evil", str(tmp_path / "abs.txt"): b"evil", "a/../../outside.txt": b"evil"}
    extra = [
        device, fifo, link("soft", "../../outside.txt"), link("a/soft", str(outside)), link("dir", ".."),
        link("hard", "../outside.txt", tarfile.LNKTYPE), link("up", "a/../../outside.txt"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "c.tar.gz", {"good.wav": b"g", **evil}, extra=extra)
    with tarfile.open(tmp_path / "late.tar", "w") as tar:  # a link first, then a file through it
        tar.addfile(link("d", str(tmp_path)))
        info = tarfile.TarInfo("d/outside.txt")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))
    report = Report("x")
    folder = unpack(path, tmp_path / "deep" / "into", report)
    assert tree(folder) == {"good.wav": b"g"} and outside.read_text() == "mine"
    assert set(lines(report)) == {f"c.tar.gz: {name}" for name in [*evil, *(info.name for info in extra)]}
    late = unpack(tmp_path / "late.tar", tmp_path / "deep" / "into", report)
    assert tree(late) == {"d/outside.txt": b"evil"} and outside.read_text() == "mine"
    assert not (late / "d").is_symlink() and not (tmp_path / "abs.txt").exists()
    # Refused members are reported again on every call.
    again = Report("x")
    unpack(path, tmp_path / "deep" / "into", again)
    assert again.ignored == report.ignored[: len(again.ignored)] and len(again.ignored) == 10


def test_zips_land_inside_too(tmp_path):
    path = tmp_path / "c.zip"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("../evil.txt", "evil")
        packed.writestr("/evil.txt", "evil")
        packed.writestr("..\\evil2.txt", "evil")
        packed.writestr("a\\b.wav", "b")
        soft = zipfile.ZipInfo("soft")
        soft.create_system, soft.external_attr = 3, 0o120777 << 16
        packed.writestr(soft, "../../evil.txt")
    report = Report("x")
    folder = unpack(path, tmp_path / "into", report)
    assert tree(folder) == {"a/b.wav": b"b"}
    assert sorted(lines(report)) == sorted(f"c.zip: {n}" for n in ("../evil.txt", "/evil.txt", "../evil2.txt", "soft"))
    assert [p for p in tmp_path.rglob("evil*")] == []


def test_links_inside_become_copies(tmp_path):
    extra = [link("a/soft.wav", "one.wav"), link("hard.wav", "a/one.wav", tarfile.LNKTYPE), link("gone", "nowhere")]
    report = Report("x")
    folder = unpack(write_tar(tmp_path / "c.tar", FILES, "w", extra), tmp_path / "into", report)
    assert tree(folder) == {**FILES, "a/soft.wav": b"one", "hard.wav": b"one"}
    assert not (folder / "a/soft.wav").is_symlink() and list(lines(report)) == ["c.tar: gone"]


def test_what_macos_leaves_is_skipped(tmp_path):
    more = {"a/._one.wav": b"m", "__MACOSX/a/one.wav": b"m", ".DS_Store": b"m"}
    for path in (write_tar(tmp_path / "c.tar.gz", {**FILES, **more}), write_zip(tmp_path / "d.zip", {**FILES, **more})):
        report = Report("x")
        assert tree(unpack(path, tmp_path / "into", report)) == FILES
        assert lines(report) == {path.name: "3 files that macOS puts into archives were skipped."}


@pytest.mark.parametrize("name", ["c.tar.gz", "c.tar", "c.zip"])
def test_a_truncated_archive_gives_what_can_be_read(tmp_path, name):
    files = {f"{i}.wav": os.urandom(3000) for i in range(10)}
    path = tmp_path / name
    write_zip(path, files) if name.endswith("zip") else write_tar(path, files, "w" if name == "c.tar" else "w:gz")
    whole = path.read_bytes()
    for share in (0, 0.001, 0.35, 0.7):
        path.write_bytes(whole[: int(share * len(whole))])
        report = Report("x")
        found = tree(unpack(path, tmp_path / "into", report))
        assert all(found[key] == files[key] for key in found)  # no file is truncated
        assert len(found) >= (int(share * 10) - 1 if "tar" in name else 0) and len(found) < 10
        assert "damaged or cut short" in lines(report)[name]


def test_a_tar_that_ends_between_two_members_is_noticed(tmp_path):
    path = write_tar(tmp_path / "c.tar", {f"{i}.wav": bytes(512) for i in range(4)}, "w")
    path.write_bytes(path.read_bytes()[: 2 * 1024])
    report = Report("x")
    assert len(tree(unpack(path, tmp_path / "into", report))) == 2
    assert "its end is missing" in lines(report)["c.tar"]


def test_one_damaged_member_does_not_cost_the_others(tmp_path):
    path = write_zip(tmp_path / "c.zip", {f"{i}.wav": os.urandom(3000) for i in range(3)})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    report = Report("x")
    assert sorted(tree(unpack(path, tmp_path / "into", report))) == ["0.wav", "2.wav"]
    assert list(lines(report)) == ["c.zip: 1.wav"]


def test_a_file_where_a_folder_is_and_names_that_are_too_long(tmp_path):
    files = {"a": b"file", "a/b.wav": b"b", "x" * 300: b"long", "ok.wav": b"o"}
    report = Report("x")
    assert tree(unpack(write_tar(tmp_path / "c.tar.gz", files), tmp_path / "into", report)) == {
        "a": b"file", "ok.wav": b"o",
    }  # fmt: skip
    assert set(lines(report)) == {"c.tar.gz: a/b.wav", f"c.tar.gz: {'x' * 300}"}


def test_no_archive_at_all(tmp_path):
    pointer = tmp_path / "c.tar.gz"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(LayoutError, match=r"c\.tar\.gz: is a Git-LFS pointer.*git lfs pull"):
        unpack(pointer, tmp_path / "into", Report("x"))
    pointer.write_text("<html>404</html>")
    report = Report("x")
    assert tree(unpack(pointer, tmp_path / "into", report)) == {} and "0 files were read" in lines(report)["c.tar.gz"]
    with pytest.raises(FileNotFoundError):
        unpack(tmp_path / "none.zip", tmp_path / "into", Report("x"))


def test_a_killed_run_leaves_no_half(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "c.tar.gz", FILES)
    write, calls = archives._write, []

    def killed(member, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(member, target)

    monkeypatch.setattr(archives, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        unpack(path, tmp_path / "into", Report("x"))
    assert not (tmp_path / "into" / "c").exists()
    assert tree(unpack(path, tmp_path / "into", Report("x"))) == FILES and len(calls) == 5
    assert sorted(p.name for p in (tmp_path / "into").iterdir()) == [".c.unpacked", "c"]


@pytest.mark.parametrize("kind", ["a name that is empty", "a name that is not UTF-8"])
def test_a_zip_with_a_damaged_index(tmp_path, kind):
    path = write_zip(tmp_path / "c.zip", {"a.wav": b"a", "b.wav": b"b"})
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\1\2")
    if kind == "a name that is empty":
        data[entry + 46] = 0  # zipfile ends names there
    else:
        data[entry + 46], data[entry + 9] = 0xFF, data[entry + 9] | 8  # and flags the name as UTF-8
    path.write_bytes(data)
    report = Report("x")
    found = tree(unpack(path, tmp_path / "into", report))
    if kind == "a name that is empty":
        assert found == {"b.wav": b"b"} and list(lines(report)) == ["c.zip: "]
    else:
        assert found == {} and "it is damaged or cut short ('utf-8' codec" in lines(report)["c.zip"]


def test_an_index_with_any_byte_damaged_ends_nothing(tmp_path):
    path = write_zip(tmp_path / "c.zip", {"a.wav": b"a", "ü.wav": b"b"})
    whole = path.read_bytes()
    for place in range(whole.index(b"PK\1\2"), len(whole)):
        for value in (0, 0xFF):
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            unpack(path, tmp_path / "into", Report("x"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.zip", "into"]
