"""Clips inside a data set (`prepare --embed`): kept beside the replies, shown in the report, played in the study."""

import json
import shutil
from pathlib import Path

import pytest
from accelerate import PartialState
from datasets import load_dataset

from empathic.cli import main
from empathic.data_prep.corpora.folder import prepare_folder
from empathic.data_prep.views import DialogueSamples
from empathic.evaluation.replies import write_replies
from empathic.evaluation.saved_clips import digest_of, parts_of, save_clips, saved_clips
from empathic.evaluation.study.build import StudyOptions, build
from empathic.evaluation.study.replies import StudyError, read_replies
from empathic.evaluation.systems.base import Reply


@pytest.fixture(scope="module")
def embedded(recordings, tmp_path_factory):
    """A prepared data set that holds its clips itself; their files are gone."""
    raw = tmp_path_factory.mktemp("raw") / "raw"
    shutil.copytree(Path(load_dataset(recordings.data, split="validation")[0]["video"]["path"]).parent, raw)
    data = tmp_path_factory.mktemp("embedded")
    prepare_folder(raw, data, embed=True, progress=False)
    shutil.rmtree(raw)
    return data


@pytest.fixture(scope="module")
def stored(embedded):
    """{digest: bytes} of the clips that somebody replied to."""
    samples = DialogueSamples(load_dataset(str(embedded), split="validation"))
    found = [part for sample in samples for part in parts_of(sample["prompt"]) if part.get("bytes")]
    return {digest_of(part["bytes"]): part["bytes"] for part in found}


@pytest.fixture(scope="module")
def evaluated(embedded, base_folder, tmp_path_factory):
    """A function (options) that evaluates two systems and gives OUT."""
    out = tmp_path_factory.mktemp("out")

    def run(*options):
        systems = [f"a=empathic:{base_folder}", f"b=empathic:{base_folder},media=false"]
        line = ["--data", str(embedded), "--split=validation", "--metrics", "dist1", "--max_new_tokens=4"]
        line += ["--resamples=20", "--device=cpu", f"--output={out}"]
        assert main(["evaluate", "dialogue", *systems, *line, *options]) == 0
        PartialState._reset_state()  # as cpu, for other tests
        return out

    return run


class Echo:
    name, batch_size, settings = "echo", 4, {}

    def reply(self, samples, seeds):
        return [Reply("hm", {}) for _ in samples]


def test_a_report_and_a_study_show_what_was_inside_the_data_set(evaluated, stored, tmp_path):
    out = evaluated("--clips=0")
    assert not (out / "dialogue" / "clips").exists() and len(stored) == 3
    replies = [out / "dialogue" / f"{name}.jsonl" for name in "ab"]
    lines = [file.read_bytes() for file in replies]
    assert main(["evaluate", "report", str(out), f"--output={tmp_path}"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<video" not in page and "The clip is stored in the data set" in page
    with pytest.raises(StudyError, match=r"only [0-6] conversations .*larger --clips"):
        build(list(map(str, replies)), tmp_path / "study", StudyOptions(conversations=9, raters=2))

    # The same command keeps them, once for both systems, and the replies stay as they are.
    evaluated()
    assert [file.read_bytes() for file in replies] == lines
    assert sum(map(len, lines)) < 40_000 and all(digest.encode() in lines[0] for digest in stored)
    files = saved_clips(replies[0])
    assert {digest: file.read_bytes() for digest, file in files.items()} == stored
    assert sorted(file.suffix for file in files.values()) == [".mp4", ".mp4", ".wav"]
    assert len(list((out / "dialogue" / "clips").iterdir())) == 3

    moved = shutil.copytree(out, tmp_path / "another_machine")
    assert main(["evaluate", "report", str(moved), "--samples=9"]) == 0
    page = (moved / "report.html").read_text()
    assert "stored in the data set" not in page
    # Each clip stands in two of the nine conversations.
    assert page.count('src="data:video/mp4;base64,') == 4 and page.count('src="data:audio/mp4;base64,') == 2
    sources = [str(moved / "dialogue" / f"{name}.jsonl") for name in "ab"]
    key = build(sources, tmp_path / "study", StudyOptions(conversations=9, raters=2), static=True)
    assert key["left_out"] == [] and sum(each["clip"] for each in key["conversations"].values()) == 6
    media = list((tmp_path / "study" / "media").iterdir())
    shown = [file.read_bytes() for file in media if file.suffix == ".mp4"]
    for digest, file in files.items():
        if file.suffix == ".mp4":  # what a browser plays already comes as it is
            assert shown.count(stored[digest]) == 2
    assert len(media) == 6 and not any(digest in file.name for digest in stored for file in media)
    for page in (tmp_path / "study" / "raters").iterdir():
        assert not any(digest in page.read_text() for digest in stored)  # nor does a page tell where it is from


def test_only_what_is_missing_is_written(embedded, stored, tmp_path):
    samples = DialogueSamples(load_dataset(str(embedded), split="validation"))
    path = write_replies(Echo(), samples, tmp_path, clips=1, progress=False)
    (first,) = saved_clips(path).values()
    write_replies(Echo(), samples, tmp_path, clips=9, progress=False)
    files = saved_clips(path)
    assert set(files) == set(stored) and first in files.values()
    first.unlink()
    read = []

    class Watched(list):
        def __getitem__(self, place):
            read.append(place)
            return super().__getitem__(place)

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    before = {file: file.stat().st_mtime_ns for file in saved_clips(path).values()}
    save_clips(path, rows, Watched(samples[place] for place in range(len(samples))), 9)
    assert {file.name: file.read_bytes() for file in saved_clips(path).values()} == {
        file.name: stored[digest] for digest, file in files.items()
    }
    assert len(read) == 1 and all(file.stat().st_mtime_ns == time for file, time in before.items())


def test_a_digest_is_no_path(tmp_path):
    """Nothing outside the folder is read, whatever a line says; and no name of a clip becomes a path."""
    (tmp_path / "key.json").write_text("secret")
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "notes.txt").write_text("mine")
    content = [{"type": "video", "digest": name} for name in ("../key", "notes", ["x"], None)]
    row = {"id": "c/s/d/1", "prompt": [{"role": "user", "content": content}], "reply": "r", "reference": "t"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    ((conversation,), _) = read_replies([str(tmp_path / "a.jsonl")])
    assert conversation.prompt[0]["content"] == content
    for name in ("../../evil.mp4", "x.mp4/../../y", "clip.😀", None):
        sample = {"prompt": [{"role": "user", "content": [{"type": "video", "path": name, "bytes": b"clip"}]}]}
        row["prompt"][0]["content"] = [{"type": "video", "digest": digest_of(b"clip")}]
        shutil.rmtree(tmp_path / "clips", ignore_errors=True)
        save_clips(tmp_path / "a.jsonl", [row], [sample], 1)
        (file,) = saved_clips(tmp_path / "a.jsonl").values()
        assert file.parent == tmp_path / "clips" and file.stem == digest_of(b"clip") and file.suffix in ("", ".mp4")
