"""The wheel and the source distribution, built from a copy of the repository and tried without it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from empathic.files import packaged
from empathic.trainers import train

ROOT = Path(__file__).parents[1]


def run(*command, cwd, status=0):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_files_of_the_package_are_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert packaged("recipes/tiny/epo.yaml") == str(ROOT / "recipes/tiny/epo.yaml")
    assert packaged("accelerate_configs/zero3.yaml") == str(ROOT / "accelerate_configs/zero3.yaml")
    for name in ("recipes/tiny/none.yaml", "setup.cfg", "tests/conftest.py", "../recipes/tiny/epo.yaml"):
        assert packaged(name) == name
    script, _, _ = train.parse(["--config", "recipes/tiny/epo.yaml", "--output_dir", str(tmp_path / "out")])
    assert script.stage == "epo"
    own = tmp_path / "recipes" / "tiny" / "epo.yaml"
    own.parent.mkdir(parents=True)
    own.write_text((ROOT / "recipes/tiny/emotion.yaml").read_text())
    assert packaged("recipes/tiny/epo.yaml") == "recipes/tiny/epo.yaml"
    script, _, _ = train.parse(["--config", "recipes/tiny/epo.yaml", "--output_dir", str(tmp_path / "out")])
    assert script.stage == "emotion"


def test_release_notes_are_those_of_the_version_that_is_tagged(tmp_path):
    copy = tmp_path / ".ci" / "release_notes.py"
    copy.parent.mkdir()
    copy.write_text((ROOT / ".ci" / "release_notes.py").read_text())
    (tmp_path / "setup.cfg").write_text("[metadata]\nversion = 1.2.0\n")
    changes = tmp_path / "CHANGELOG.md"
    changes.write_text("# Changelog\n\n## 1.2.0 (2026-12-01)\n\n- New: all of it.\n\n## 1.1.0\n\n- Old.\n")
    assert run(sys.executable, copy, "v1.2.0", cwd=tmp_path) == "- New: all of it.\n"
    run(sys.executable, copy, "v1.3.0", cwd=tmp_path, status=1)
    changes.write_text(changes.read_text().replace("2026-12-01", "unreleased"))
    run(sys.executable, copy, "v1.2.0", cwd=tmp_path, status=1)


@pytest.mark.slow
def test_the_wheel_has_all_that_it_needs_and_runs_without_the_repository(tmp_path):
    """Built without a network, in this environment; a second environment sees the packages of this one, but not this
    package. `make test-wheel` does the same with packages from the index."""
    source = tmp_path / "source"
    source.mkdir()
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in tracked.stdout.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    # The wheel is built from the source distribution, which thus has all that is needed.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", cwd=source)
    [wheel] = (tmp_path / "dist").glob("*.whl")
    [archive] = (tmp_path / "dist").glob("*.tar.gz")
    assert archive.name.removesuffix(".tar.gz") == wheel.name.partition("-py3")[0]
    outside = [name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("empathic")]
    assert not outside

    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    [packages] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    [ours] = [path for path in map(Path, sys.path) if path.name == "site-packages"][:1]
    (packages / "others.pth").write_text(f"{ours}\n")
    shown = run(python, ROOT / ".ci" / "try_installed.py", cwd="/")
    assert "commands are there" in shown
    assert "usage: empathic quickstart" in run(tmp_path / "venv" / "bin" / "empathic", "quickstart", "--help", cwd="/")
