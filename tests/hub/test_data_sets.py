"""Pushing to the Hub and loading from it: the real client with a local server."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import HfApi, constants, snapshot_download
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from trl import ModelConfig

from empathic.cli import main
from empathic.composition_empathic import PARTS_FILE, STAGE_FILE
from empathic.data_prep.corpora.base import CorpusInfo
from empathic.data_prep.corpora.folder import prepare_folder
from empathic.data_prep.counter.pairs import pair_features
from empathic.data_prep.views import dialogue_samples
from empathic.data_prep.writer import card_header
from empathic.hub import PushError, kind_of, push_dataset
from empathic.hub import data_sets as pushing
from empathic.hub.models import PROCESSOR_FILES, push_model
from empathic.modeling_empathic import EmpathicForConditionalGeneration
from empathic.processing_empathic import EmpathicProcessor
from empathic.trainers import train
from empathic.trainers.checkpoints.stage_folder import StageRecord

DATA, MODEL = "me/recordings", "me/chatbot"


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="session")
def recordings(tmp_path_factory, write_media, grey_frames, tone):
    """A function (folder, embed) -> a prepared data set with two splits of two turns each."""
    raw = tmp_path_factory.mktemp("raw")
    write_media(raw / "a.mp4", frames=grey_frames(3), samples=tone(0.3))
    lines = [
        {"dialogue_id": split, "turn": turn, "speaker": name, "text": f"{name} in {split}", "split": split}
        | ({"file_name": "a.mp4"} if turn == 0 else {})
        for split in ("train", "test")
        for turn, name in enumerate(("ann", "ben"))
    ]
    (raw / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def prepare(folder, embed=True):
        prepare_folder(raw, folder, embed=embed, progress=False)
        return folder

    return prepare


@pytest.fixture
def data(recordings, tmp_path):
    return recordings(tmp_path / "data")


def rows_of(data, split):
    (file,) = (data / "data").glob(f"{split}-*.parquet")
    return pq.read_table(file).to_pylist()


def pairs_of(data, out, plain_text=False):
    """Preference pairs of a prepared data set, as `empathic counter` writes them."""
    row = next(dialogue_samples(rows_of(data, "train")))
    replies = [[{"role": "assistant", "content": text}] for text in (row["reply"], "no")]
    if plain_text:
        for message in row["prompt"]:
            message["content"] = message["content"][-1]["text"]
    row |= {"chosen": replies[0], "rejected": replies[1], "rejected_emotion": "sad", "similarity": 0.0}
    (out / "data").mkdir(parents=True)
    table = pa.Table.from_pylist([row], schema=pair_features(plain_text).arrow_schema)
    pq.write_table(table, out / "data" / "train-00000-of-00001.parquet")
    (out / "README.md").write_text(card_header({"train": "train-00000-of-00001.parquet"}))
    (out / "report.json").write_text("{}")
    (out / "audit.html").write_text("<p>pairs</p>")
    (out / ".work").mkdir()  # candidates are kept for another selection
    (out / ".work" / "done.json").write_text("{}")
    return out


def in_process(code, *arguments, cwd):
    """Run code in a new process with the environment of the fixture `hub`; return its output."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --------------------------------------------------------------------------------------------------------- data sets

LOAD_DATASETS = """
import json, hashlib, sys
from datasets import load_dataset
digest = lambda clip: clip and [clip["path"], hashlib.sha256(clip["bytes"]).hexdigest()]
loaded = [load_dataset(name) for name in sys.argv[1:]]
for part in loaded[0].values():
    assert part.cache_files
rows = [[{**row, "audio": digest(row["audio"]), "video": digest(row["video"])} for row in part]
        for loaded_ in loaded[:2] for name, part in sorted(loaded_.items())]
pair = loaded[2]["train"][0]
print(json.dumps([rows, pair["chosen"], [len(item["bytes"] or "") for item in pair["prompt"][-1]["content"]]]))
"""


def test_data_sets_and_pairs_come_back_with_their_clips(hub, data, tmp_path):
    assert push_dataset(data, DATA) == f"{hub.url}/datasets/{DATA}"
    pairs = pairs_of(data, tmp_path / "pairs")
    assert kind_of(pairs) == "pairs" and kind_of(data) == "dataset"
    assert main(["push", str(pairs), "me/pairs"]) == 0
    assert all(hub.repositories["dataset", name].private for name in (DATA, "me/pairs"))
    assert not [path for path in hub.files("me/pairs", "dataset") if path.startswith(".work")]
    rows, chosen, sizes = json.loads(in_process(LOAD_DATASETS, data, DATA, "me/pairs", cwd=tmp_path))
    assert rows[:2] == rows[2:] and [len(part) for part in rows] == [2] * 4
    size = len(rows_of(data, "train")[0]["video"]["bytes"])
    assert rows[2][0]["video"][0] == "a.mp4" and size > 1000
    assert chosen == [{"role": "assistant", "content": "ben in train"}] and sizes == [size, size, 0]


def test_only_the_data_set_is_pushed(hub, data):
    (data / "audit.html").write_text("<p>seen</p>")
    for name in ("media/a.wav", "unpacked/meld/a.mp4", "notes.txt", "data/.cache"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(b"1")
    shutil.copy(next((data / "data").glob("test-*")), data / "data" / "old.parquet")
    push_dataset(data, DATA)
    parquet = {f"data/{path.name}" for path in (data / "data").glob("*-?????-of-?????-*.parquet")}
    assert len(parquet) == 2
    assert set(hub.files(DATA, "dataset")) == {"README.md", "report.json", "audit.html"} | parquet


def test_pairs_of_plain_text(hub, recordings, tmp_path):
    """The pairs have no clips, even if their corpus has."""
    data = recordings(tmp_path / "data", embed=False)
    push_dataset(pairs_of(data, tmp_path / "pairs", plain_text=True), "me/pairs")
    assert len(hub.files("me/pairs", "dataset")) == 4


def prepare_again(folder):
    """Change a text in the training split, which gives its file another name."""
    (old,) = (folder / "data").glob("train-*.parquet")
    table = pq.read_table(old)
    text = pa.array(["other"] * len(table))
    new = old.with_name(old.name[:-12] + "0000.parquet")
    pq.write_table(table.set_column(table.column_names.index("text"), "text", text), new)
    card = folder / "README.md"
    card.write_text(card.read_text().replace(old.name, new.name))
    old.unlink()
    return new


def test_a_second_push_replaces_the_first(hub, data):
    push_dataset(data, DATA)
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.md", repo_id=DATA, repo_type="dataset")
    first, repository = hub.files(DATA, "dataset"), hub.repositories["dataset", DATA]
    push_dataset(data, DATA)
    assert len(list(repository.history("main"))) == 3  # nothing changed
    new = prepare_again(data)
    push_dataset(data, DATA)
    assert len(list(repository.history("main"))) == 4
    second = hub.files(DATA, "dataset")
    (gone,) = set(first) - set(second)
    assert gone.startswith("data/train-") and set(second) - set(first) == {f"data/{new.name}"}
    assert second["notes.md"] == b"mine"
    assert pq.read_table(io.BytesIO(second[f"data/{new.name}"]))["text"].to_pylist() == ["other"] * 2


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / ".work").mkdir(), "not finished. Run the command"),
        (
            lambda f: ((f / ".work" / "x").mkdir(parents=True), (f / ".work" / "x" / "done.json").touch()),
            "not finished. Run the command",
        ),
        (lambda f: (f / "data" / "train.part").touch(), "not finished. Run the command"),
        (lambda f: (f / "report.json").unlink(), "no report.json"),
        (lambda f: (f / "README.md").unlink(), "no README.md"),
        (lambda f: next((f / "data").glob("test-*")).unlink(), r"there is no data/test-.*names"),
        (lambda f: (f / "README.md").write_text("# Mine\n"), "names no data files"),
        (lambda f: cut(next((f / "data").glob("test-*"))), "not a complete parquet file"),
        (lambda f: (f / "report.json").write_text("{"), "report.json: is not JSON"),
    ],
)
def test_an_unfinished_data_set_is_refused(hub, data, spoil, message):
    spoil(data)
    with pytest.raises(PushError, match=message):
        push_dataset(data, DATA)
    assert not hub.requests


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def test_clips_that_are_paths_are_refused(hub, recordings, tmp_path):
    data = recordings(tmp_path / "paths", embed=False)
    with pytest.raises(PushError, match=r"data/t.*parquet: refers to local files, such as /.*a\.mp4.*--embed"):
        push_dataset(data, DATA)
    pairs = pairs_of(data, tmp_path / "pairs")
    with pytest.raises(PushError, match=r"such as /.*a\.mp4.*--embed, and make the pairs from it"):
        push_dataset(pairs, DATA, i_may_redistribute=True)
    assert not hub.requests


def test_a_licence_that_forbids_it(hub, data, tmp_path, monkeypatch, capsys):
    pairs = pairs_of(data, tmp_path / "pairs")
    for info, message in ((CorpusInfo("folder", "", "", "other", "On request.", False, ""), "On request"),
                          (None, "not known here")):  # fmt: skip
        monkeypatch.setattr(pushing, "about", lambda corpus, info=info: info if corpus == "folder" else 1 / 0)
        for folder in (data, pairs):
            with pytest.raises(PushError, match=f"clips of folder.*{message}.*--i_may_redistribute"):
                push_dataset(folder, DATA)
    assert main(["push", str(data), DATA]) == 1 and "not known here" in capsys.readouterr().err
    assert not hub.requests
    assert main(["push", str(data), DATA, "--i-may-redistribute"]) == 0
    assert hub.repositories["dataset", DATA].private and len(hub.files(DATA, "dataset")) == 4


def test_what_is_known_of_the_corpora():
    known = {name: pushing.about(name) for name in ("crema-d", "ravdess", "folder", "iemocap", "somebody's")}
    assert [info and info.redistributable for info in known.values()] == [True, True, True, False, None]


# -------------------------------------------------------------------------------------------------------------- Hub


def test_private_unless_asked_and_never_changed(hub, data, capsys):
    assert main(["push", str(data), DATA, "--public", "--message", "first"]) == 0
    assert hub.url in capsys.readouterr().out
    repository = hub.repositories["dataset", DATA]
    assert not repository.private and repository.at("main").title == "first"
    with pytest.raises(PushError, match=r"is public\. Push with --public"):
        push_dataset(data, DATA)
    push_dataset(data, "me/other")
    with pytest.raises(PushError, match=r"is private\. Push without --public"):
        push_dataset(data, "me/other", private=False)
    assert hub.repositories["dataset", "me/other"].private


def test_another_branch(hub, data):
    url = push_dataset(data, DATA, revision="draft/1")
    assert url.endswith("/tree/draft/1")
    assert not hub.files(DATA, "dataset") and len(hub.files(DATA, "dataset", "draft/1")) == 4
    push_dataset(data, DATA, revision="draft/1")


def test_tokens_and_names_that_do_not_do(hub, data, monkeypatch):
    with pytest.raises(PushError, match=r"does not know the token.*hf auth login.*settings/tokens"):
        push_dataset(data, DATA, token="hf_wrong")
    with pytest.raises(PushError, match=r"cannot write to them/recordings"):
        push_dataset(data, "them/recordings")
    with pytest.raises(PushError, match=r"Cannot push to.*no spaces"):
        push_dataset(data, "me/no spaces")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PushError, match=r"no token.*hf auth login.*HF_TOKEN"):
        push_dataset(data, DATA)
    push_dataset(data, DATA, token="hf_of_me")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="offline mode"):
        push_dataset(data, DATA, token="hf_of_me")
    assert list(hub.repositories) == [("dataset", DATA)]


def test_a_card_that_the_hub_refuses(hub, data):
    card = data / "README.md"
    card.write_text(card.read_text().replace("configs:", "base_model: /home/me/base\nconfigs:"))
    with pytest.raises(PushError, match=r"base_model.*not valid"):
        push_dataset(data, DATA)
    assert not hub.files(DATA, "dataset")


def test_a_push_that_is_cut_off_leaves_nothing_half(hub, data, tmp_path):
    push_dataset(data, "me/whole")
    whole, count = hub.files("me/whole", "dataset"), len(hub.requests)
    assert count > 8
    for place in range(count + 1):
        name, lost = f"me/cut-{place}", place == count
        hub.objects.clear()
        hub.fail_after(requests=place, answered=not lost)
        with pytest.raises(PushError, match=r"interrupted.*Call it again"):
            push_dataset(data, name)
        hub.heal()
        if ("dataset", name) in hub.repositories:  # the files are there only if the answer to the commit was lost
            assert hub.files(name, "dataset") == (whole if lost else {}), place
        push_dataset(data, name)
        assert hub.files(name, "dataset") == whole
        assert len(list(hub.repositories["dataset", name].history("main"))) == 2


def test_a_push_that_is_cut_off_leaves_the_earlier_one(hub, data, tmp_path):
    push_dataset(data, DATA)
    first, start = hub.files(DATA, "dataset"), len(hub.requests)
    prepare_again(data)
    size = sum(path.stat().st_size for path in (data / "data").glob("train-*"))
    hub.fail_after(received=size // 2)
    with pytest.raises(PushError, match="interrupted"):
        push_dataset(data, DATA)
    assert hub.files(DATA, "dataset") == first and any("PUT" in request for request in hub.requests[start:])
    hub.heal()
    push_dataset(data, DATA)
    assert hub.files(DATA, "dataset") != first


def test_a_killed_push_goes_on_with_what_is_missing(hub, data, tmp_path):
    """The process is killed during the upload of the last large file; uploaded files are not sent again."""
    sizes = [path.stat().st_size for path in (data / "data").glob("*.parquet")]
    assert len(sizes) == 2
    hub.stall_after(received=sum(sizes))  # other requests come first, so part of the last file is missing
    command = [sys.executable, "-m", "empathic.cli", "push", str(data), DATA, "--i-may-redistribute"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert hub.stalled.wait(120)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    there, before = len(hub.objects), len(hub.requests)
    assert not hub.files(DATA, "dataset")
    hub.heal()
    push_dataset(data, DATA)
    uploads = [request for request in hub.requests[before:] if request.startswith("PUT")]
    assert len(uploads) == 2 - there
    assert len(hub.files(DATA, "dataset")) == 4


# ------------------------------------------------------------------------------------------------------------ models

LOAD_MODEL = """
import sys, torch
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("empathic", "trl", "datasets", "evaluate"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] in ("empathic", "trl", "datasets", "evaluate") else find_spec(name, package)
)
torch.set_num_threads(1)
from transformers import AutoModelForMultimodalLM, AutoProcessor
out, clip, name = sys.argv[1:]
model = AutoModelForMultimodalLM.from_pretrained(name, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
turn = [{"type": "audio", "path": clip}, {"type": "video", "path": clip}, {"type": "text", "text": "how are you"}]
messages = [{"role": "user", "content": "hello there"}, {"role": "user", "content": turn}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
with torch.no_grad():
    logits = model(**inputs).logits
ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
processor.apply_chat_template(messages, task="emotion")
torch.save({"inputs": dict(inputs), "logits": logits, "ids": ids}, out)
"""


@pytest.fixture(scope="module")
def built_house(base_folder, tmp_path_factory):
    """`base`; `one`, a stage with this base that trained two tensors; `two`, an adapter with the base `one`."""
    torch.manual_seed(0)
    house = tmp_path_factory.mktemp("houses") / "house"
    shutil.copytree(base_folder, house / "base")
    processor = EmpathicProcessor.from_pretrained(base_folder)
    model = EmpathicForConditionalGeneration.from_pretrained(house / "base")
    names = ["model.video_query_tokens", "model.memory.mem_embedding"]
    tensors = {name: torch.randn_like(model.get_parameter(name)) for name in names}
    (house / "one").mkdir()
    save_file(tensors, house / "one" / PARTS_FILE)
    StageRecord("emotion", str(house / "base"), names).save(model, str(house / "one"))
    processor.save_pretrained(house / "one")
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(house / "one")
    adapted.save_pretrained(house / "two")
    StageRecord("dialogue", str(house / "one"), []).save(adapted.get_base_model(), str(house / "two"))
    processor.save_pretrained(house / "two")
    return house


@pytest.fixture
def house(built_house, tmp_path):
    return shutil.copytree(built_house, tmp_path / "house")


def test_models_and_stages_load_from_the_hub_and_generate(hub, house, clip, tmp_path):
    for name in ("trainer_state.json", "all_results.json", "training_args.bin", "optimizer.pt", "checkpoint-5/model.pt",
                 "checkpoint-5/model.safetensors", "notes.txt", "optimizer.safetensors"):  # fmt: skip
        (house / "two" / name).parent.mkdir(exist_ok=True)
        (house / "two" / name).write_text("{}")
    ids = {name: f"me/{name}" for name in ("base", "one", "two")}
    assert push_model(house / "base", ids["base"], private=False) == f"{hub.url}/me/base"
    with pytest.raises(PushError, match=r"'emotion' has a local folder as its base, \.\./base.*empathic merge.*--base"):
        push_model(house / "one", ids["one"])
    with pytest.raises(PushError, match="me/nothing"):
        push_model(house / "one", ids["one"], base="me/nothing")
    assert ("model", ids["one"]) not in hub.repositories
    push_model(house / "one", ids["one"], base=ids["base"])
    assert main(["push", str(house / "two"), ids["two"], "--base", ids["one"]]) == 0
    assert [hub.repositories["model", name].private for name in ids.values()] == [False, True, True]
    # the pushed files
    code = {name for name in os.listdir(house / "base") if name.endswith("_empathic.py")}
    common = {*PROCESSOR_FILES, "config.json", "generation_config.json", *code}
    assert len(code) == 10
    assert set(hub.files(ids["base"])) == common | {"model.safetensors"}
    assert set(hub.files(ids["one"])) == common | {STAGE_FILE, PARTS_FILE}
    assert set(hub.files(ids["two"])) == common | {STAGE_FILE, "adapter_config.json", "adapter_model.safetensors"}
    for name in ids.values():  # no local folder is named
        assert not [path for path, content in hub.files(name).items() if b"/house" in content]
    assert json.loads((house / "one" / STAGE_FILE).read_text())["base"] == "../base"  # the local folder is unchanged
    # the pushed stages load, each with its base
    in_process(LOAD_MODEL, tmp_path / "out.pt", clip, ids["two"], cwd=tmp_path)
    there = torch.load(tmp_path / "out.pt")
    logits = {}
    for name in ids:
        model = EmpathicForConditionalGeneration.from_pretrained(house / name).eval()
        with torch.no_grad():
            logits[name] = model(**there["inputs"]).logits
    assert torch.allclose(logits["two"], there["logits"], atol=1e-5)
    assert torch.equal(model.generate(**there["inputs"], max_new_tokens=4, do_sample=False), there["ids"])
    assert not torch.allclose(logits["base"], logits["one"], atol=1e-3)
    assert not torch.allclose(logits["one"], logits["two"], atol=1e-3)


LOAD_OFFLINE = """
import sys
from empathic.data_prep.loading import load_prepared
from empathic.processing_empathic import EmpathicProcessor
from empathic.trainers.checkpoints.stage_folder import load_model
load_model(sys.argv[1], trainable=True)
assert EmpathicProcessor.from_pretrained(sys.argv[1]).memory_tokenizer.get_vocab()["<MEM>"]
print({name: len(rows) for name, rows in sorted(load_prepared(sys.argv[2]).items())})
load_prepared("me/nothing")
"""


def test_what_was_downloaded_as_a_whole_loads_without_a_network(hub, house, data, clip, tmp_path, monkeypatch):
    """`hf download` on a login node, then HF_HUB_OFFLINE=1 on a compute node: no file was looked for in vain before."""
    push_model(house / "base", "me/base")
    push_model(house / "one", "me/one", base="me/base")
    push_model(house / "two", "me/two", base="me/one")
    push_dataset(data, DATA)
    for name in ("me/base", "me/one", "me/two"):
        snapshot_download(name)
    snapshot_download(DATA, repo_type="dataset")
    shutil.rmtree(house)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    in_process(LOAD_MODEL, tmp_path / "out.pt", clip, "me/two", cwd=tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", LOAD_OFFLINE, "me/two", DATA], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert "{'test': 2, 'train': 2}" in done.stdout, done.stderr
    assert "download the data set first: `hf download --repo-type dataset me/nothing`" in done.stderr


def test_another_revision_of_a_model_is_trained_and_stays_the_base(hub, house, tmp_path):
    """The stage's folder names the revision of its base, which every loader then takes."""
    push_model(house / "base", "me/base")
    state = load_file(house / "base" / "model.safetensors")
    state["model.language_model.norm.weight"] *= 7
    save_file(state, house / "base" / "model.safetensors", metadata={"format": "pt"})
    push_model(house / "base", "me/base", revision="v2")
    script = train.ScriptArguments(stage="dialogue", dataset_name=[])
    model, _, base = train.build_model(script, ModelConfig("me/base", model_revision="v2"))
    newest, _, _ = train.build_model(script, ModelConfig("me/base"))
    assert base == ("me/base", "v2")
    norms = [model.model.language_model.norm.weight, 7 * newest.model.language_model.norm.weight]
    assert torch.equal(*norms)
    with pytest.raises(OSError, match="no-such"):
        train.build_model(script, ModelConfig("me/base", model_revision="no-such"))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj"))
    adapted.save_pretrained(tmp_path / "stage")
    StageRecord("dialogue", "me/base", [], base_revision="v2").save(adapted.get_base_model(), str(tmp_path / "stage"))
    EmpathicProcessor.from_pretrained("me/base").save_pretrained(tmp_path / "stage")
    for again in (
        EmpathicForConditionalGeneration.from_pretrained(tmp_path / "stage"),
        train.build_model(script, ModelConfig(str(tmp_path / "stage")))[0].get_base_model(),
    ):
        assert torch.equal(again.model.language_model.norm.weight, norms[0])
    push_model(tmp_path / "stage", "me/stage")
    assert json.loads(hub.files("me/stage")[STAGE_FILE])["base_revision"] == "v2"
    push_model(house / "base", "me/other")
    push_model(tmp_path / "stage", "me/stage", base="me/other")
    assert json.loads(hub.files("me/stage")[STAGE_FILE])["base_revision"] is None


@pytest.mark.parametrize(
    "name, spoil, message",
    [
        ("base", lambda f: (f / "memory_tokenizer" / "tokenizer.json").unlink(), "no memory_tokenizer/tokenizer.json"),
        ("base", lambda f: (f / "model.safetensors").unlink(), "complete model: there is no model.safetensors"),
        ("base", lambda f: cut(f / "model.safetensors"), "model.safetensors: is not a complete safetensors file"),
        ("base", lambda f: (f / "media_empathic.py").unlink(), "no media_empathic.py"),
        ("base", lambda f: edit_json(f / "config.json", auto_map=None), "config.json: names no code"),
        ("base", lambda f: shutil.rmtree(f / "additional_chat_templates"), r"templates/emotion\.jinja"),
        ("base", lambda f: edit_json(f / "config.json", model_type="qwen2"), "neither a data set"),
        ("one", lambda f: (f / PARTS_FILE).unlink(), f"complete stage: there is no {PARTS_FILE}"),
        ("one", lambda f: edit_json(f / STAGE_FILE, trained=["model.none"]), r"lacks 1 tensors.*model\.none"),
        ("one", lambda f: (f / STAGE_FILE).unlink(), f"no {STAGE_FILE}"),
        ("two", lambda f: (f / STAGE_FILE).unlink(), f"no {STAGE_FILE}"),
        ("two", lambda f: (f / "adapter_model.safetensors").unlink(), r"no adapter_model\.safetensors"),
        ("two", lambda f: (f / "adapter_config.json").unlink(), r"no adapter_config\.json"),
        ("none", lambda f: None, "there is no such folder"),
    ],
)  # fmt: skip
def test_an_incomplete_model_is_refused(hub, house, name, spoil, message):
    spoil(house / name)
    with pytest.raises(PushError, match=message):
        push_model(house / name, MODEL, base=None if name in ("base", "none") else "me/base")
    assert not hub.requests


def test_a_sharded_model_replaces_a_whole_one_and_back(hub, house, model):
    """Files of the earlier push would be loaded instead of the new files."""
    push_model(house / "base", MODEL)
    assert "model.safetensors" in hub.files(MODEL)
    shards = house / "shards"
    shutil.copytree(house / "base", shards)
    (shards / "model.safetensors").unlink()
    model.save_pretrained(shards, max_shard_size="100KB")
    tensors = [path.name for path in shards.glob("model-*-of-*.safetensors")]
    assert len(tensors) > 1
    push_model(shards, MODEL)
    weights = {name for name in hub.files(MODEL) if "safetensors" in name}
    assert weights == {*tensors, "model.safetensors.index.json"}
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="NOTES.md", repo_id=MODEL)
    push_model(house / "one", MODEL, base="me/chatbot")
    assert {name for name in hub.files(MODEL) if "safetensors" in name} == {PARTS_FILE}
    push_model(house / "base", MODEL)
    assert STAGE_FILE not in hub.files(MODEL) and "NOTES.md" in hub.files(MODEL)
    (shards / tensors[0]).unlink()
    with pytest.raises(PushError, match=f"no {tensors[0]}"):
        push_model(shards, MODEL)


def test_a_card_goes_along_and_an_empty_form_does_not(hub, house):
    assert "Model Card for Model ID" in (house / "two" / "README.md").read_text()  # PEFT wrote it
    push_model(house / "base", "me/base")
    push_model(house / "two", MODEL, base="me/base")
    assert "README.md" not in hub.files(MODEL)
    (house / "two" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Mine\n")
    push_model(house / "two", MODEL, base="me/base")
    assert hub.files(MODEL)["README.md"].endswith(b"# Mine\n")


def test_a_stage_on_parts_of_the_hub_needs_no_base(hub, house):
    parts = {"text": "Qwen/Qwen2.5-7B-Instruct", "vision": "openai/clip-vit-base-patch32", "num_frames": 8}
    edit_json(house / "one" / STAGE_FILE, base=parts)
    push_model(house / "one", MODEL)
    assert json.loads(hub.files(MODEL)[STAGE_FILE])["base"] == parts
    edit_json(house / "one" / STAGE_FILE, base={**parts, "audio": str(house)})
    with pytest.raises(PushError, match="has a local folder as its base"):
        push_model(house / "one", MODEL)
    edit_json(house / "two" / STAGE_FILE, base=parts)
    with pytest.raises(PushError, match="base of its adapter is four parts"):
        push_model(house / "two", MODEL)


def test_the_two_kinds_are_not_mixed_up(hub, house, data, capsys):
    assert [kind_of(house / name) for name in ("base", "one", "two")] == ["model", "stage", "stage"]
    with pytest.raises(PushError, match="holds a model, not a data set"):
        push_dataset(house / "base", DATA)
    with pytest.raises(PushError, match="holds a data set, not a model"):
        push_model(data, MODEL)
    for folder in (house / "base", data):
        assert main(["push", str(folder), MODEL, "--base", "me/base"]) == 1
        assert "has no base" in capsys.readouterr().err
    shutil.copy(house / "two" / "adapter_config.json", house / "base")
    with pytest.raises(PushError, match="and also an adapter"):
        push_model(house / "base", MODEL)
    assert not hub.requests


def test_the_weights_arrive_unchanged(hub, house):
    push_model(house / "base", MODEL)
    path = HfApi().hf_hub_download(MODEL, "model.safetensors")
    there, here = load_file(path), load_file(house / "base" / "model.safetensors")
    assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)
