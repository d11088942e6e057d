"""`empathic counter` as a command: with one process, with two, killed in the middle and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate import PartialState
from datasets import Dataset, load_dataset

from empathic.cli import main
from empathic.commands import counter as counter_command
from empathic.configuration_empathic import EMOTIONS
from empathic.data_prep.counter import build as counter
from empathic.data_prep.schema import row_features
from empathic.files import LOCK_FILE
from empathic.tiny.emotion_classifier import train_emotion_classifier

SAMPLES = 12
ACCELERATE = """compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
use_cpu: true
num_processes: 2
num_machines: 1
machine_rank: 0
mixed_precision: 'no'
main_process_port: 0
"""
# What `accelerate launch -m empathic.data_prep.counter.build` runs, and a file from each process that took part.
SCRIPT = """
import sys
from pathlib import Path
from accelerate import PartialState
from empathic.data_prep.counter import build as counter

options = sys.argv[1:]
status = counter.main(options[1:])
state = PartialState()
Path(options[0], f"{state.process_index}-of-{state.num_processes}").touch()
sys.exit(status)
"""


@pytest.fixture(scope="module")
def options(base_folder, tmp_path_factory):
    """A function (OUT) -> command line, on a dataset of 12 samples and a classifier with random weights."""
    root = tmp_path_factory.mktemp("counter")
    words = ["hello there", "how are you", "what did he say", "thanks", "the old dog", "i am fine"]
    rows = []
    for number in range(SAMPLES):
        for turn, speaker in enumerate(("clara", "mira")):
            row = dict.fromkeys(row_features())
            row.update(
                corpus="tests", split="train", dialogue_id=f"d{number}", turn=turn, utterance_id=f"{number}-{turn}"
            )
            rows.append(
                {**row, "speaker": speaker, "text": words[(number + turn) % 6], "emotion": EMOTIONS[number % 7]}
            )
    rows[3]["text"] = "hello " * 2000  # too long to be answered; only replies of mira are used
    rows[2]["text"], rows[3]["text"] = rows[3]["text"], "fine"
    Dataset.from_list(rows, features=row_features()).to_parquet(root / "data" / "train.parquet")
    train_emotion_classifier(root / "classifier", ["a b", "c d"], ["happy", "sad"], steps=1, progress=False)
    fixed = [f"--data={root / 'data'}", f"--classifier={root / 'classifier'}", "--threshold=2", "--near_duplicate=2"]
    fixed += ["--chunk_size=1", "--max_new_tokens=24", "--temperature=0.9", "--speakers", "mira", "--device=cpu"]
    return lambda out, *more: [f"--model={base_folder}", *fixed, f"--out={out}", *more]


@pytest.fixture(scope="module", autouse=True)
def forget_the_device():
    """Reset accelerate's state, in which `--device cpu` would stay set for the other tests of this process."""
    yield
    PartialState._reset_state()


def contents(out):
    """All files of a run except the work files and the lock: relative name -> bytes."""
    hidden = {counter.WORK, LOCK_FILE}
    files = [path for path in Path(out).rglob("*") if path.is_file() and not hidden & set(path.parts)]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def chunks(out):
    """Finished chunks: name -> identity of the file."""
    files = (Path(out) / counter.WORK).glob("*/train-*.json")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def alone(options, tmp_path_factory):
    """OUT of one process that was not interrupted."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert main(["counter", *options(out)]) == 0
    return out


def test_one_process_writes_pairs_and_says_so(alone, options, capsys, monkeypatch):
    rows = load_dataset(str(alone), split="train", cache_dir=str(alone.parent / "cache"))
    assert len(rows) == SAMPLES - 1 and len(chunks(alone)) == SAMPLES
    report = json.loads((alone / "report.json").read_text())
    (left,) = report["splits"]["train"]["left_out"]
    assert left["item"] == "tests/train/d1/1" and "exceeds the model's limit of 1024" in left["reason"]
    assert "identity" not in report["settings"] and report["settings"]["sampling"]["temperature"] == 0.9
    before = {**contents(alone), **chunks(alone)}
    monkeypatch.setattr(counter, "EmpathicForConditionalGeneration", None)  # a finished run needs no model
    assert main(["counter", *options(alone)]) == 0
    assert {**contents(alone), **chunks(alone)} == before
    assert f"train: {SAMPLES - 1} pairs of {SAMPLES} samples" in capsys.readouterr().out


def test_fewer_samples_first_are_not_written_again(options, alone, tmp_path):
    assert main(["counter", *options(tmp_path / "out", "--max_samples=3")]) == 0
    first = chunks(tmp_path / "out")
    assert len(first) == 3
    assert main(["counter", *options(tmp_path / "out", "--max_samples=5")]) == 0
    assert len(chunks(tmp_path / "out")) == 5 and first.items() <= chunks(tmp_path / "out").items()


@pytest.mark.distributed
def test_two_processes_killed_and_started_again_write_the_same_bytes(options, alone, tmp_path):
    """After kill -9 of both processes, finished chunks are not written again and the rest is divided again."""
    config, script, out, ranks = (tmp_path / name for name in ("two.yaml", "script.py", "out", "ranks"))
    config.write_text(ACCELERATE)
    script.write_text(SCRIPT)
    ranks.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "first.log", "wb") as log:
        first = subprocess.Popen(
            [sys.executable, "-m", "empathic.cli", "counter", f"--accelerate_config={config}", *options(out)],
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        while len(chunks(out)) < 2 and first.poll() is None:
            time.sleep(0.02)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    before = chunks(out)
    assert 2 <= len(before) < SAMPLES, (tmp_path / "first.log").read_text()
    assert not contents(out)

    launch = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={config}", str(script), str(ranks)]
    second = subprocess.run([*launch, *options(out)], capture_output=True, text=True, env=environment)
    assert second.returncode == 0, second.stderr[-3000:]
    assert {path.name for path in ranks.iterdir()} == {"0-of-2", "1-of-2"}
    assert second.stdout.count("pairs are in") == 1
    assert before.items() <= chunks(out).items() and len(chunks(out)) == SAMPLES
    assert contents(out) == contents(alone)


def test_what_is_interrupted_goes_on_after_the_last_chunk(options, alone, tmp_path, monkeypatch):
    """Stop once while chunks are written and once while the files are written; the generator counts its replies."""
    out, written, stop = tmp_path / "out", [], [7]
    write, publish = counter.write_candidates, counter.publish_parquet

    def counted(samples, *rest):
        if len(written) == stop[0]:
            raise KeyboardInterrupt
        written.append(samples[0]["dialogue_id"])
        return write(samples, *rest)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(counter, "write_candidates", counted)
    assert main(["counter", *options(out)]) == 130
    assert len(chunks(out)) == 7
    stop[0] = None
    monkeypatch.setattr(counter, "publish_parquet", interrupted)
    assert main(["counter", *options(out)]) == 130
    monkeypatch.setattr(counter, "publish_parquet", publish)
    monkeypatch.setattr(counter, "EmpathicForConditionalGeneration", None)
    assert main(["counter", *options(out)]) == 0
    assert sorted(written) == sorted(f"d{i}" for i in range(SAMPLES))
    assert contents(out) == contents(alone)


# -------------------------------------------------------------------------------------------------- command line


def test_another_model_writes_by_its_name(options, parts, tmp_path, capsys):
    line = [o for o in options(tmp_path / "out") if not o.startswith("--model")]
    line += [f"--generator={parts['text']}", "--max_samples=2", "--greedy", "--pooling=head", "--plain_text"]
    assert main(["counter", *line]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["history"] == "text" and report["settings"]["generator"] == parts["text"]
    assert report["settings"]["pooling"] == "head" and "2 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model=m", "--backend=vllm"], "give it with --generator"),
        (["--generator=g", "--use_adapter"], "are for --model"),
        (["--generator=g", "--history=memory"], "are for --model"),
    ],
)
def test_options_that_do_not_go_together(more, message, capsys):
    assert main(["counter", "--data=d", "--out=o", *more]) == 1
    assert message in capsys.readouterr().err


def test_options_are_handed_on_to_the_launched_processes(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(counter_command, "launch", lambda *call: ran.append(call) or 3)
    line = ["--generator=g", "--data=a b", "--out=o", "--splits", "train", "test", "--greedy", "--threshold=-0.5"]
    assert main(["counter", "--accelerate_config=c.yaml", *line]) == 3
    ((module, line, config),) = ran
    assert (module, config) == ("empathic.data_prep.counter.build", "c.yaml")
    assert {"--generator=g", "--data=a b", "--greedy", "--threshold=-0.5", "--seed=0"} <= set(line)
    assert line[line.index("--splits") : line.index("--splits") + 3] == ["--splits", "train", "test"]
    assert not any("accelerate_config" in option or "None" in option for option in line)
