"""Saved replies: what a line holds, what is resumed, and what a system of ours does with bad clips and long prompts."""

import hashlib
import json
import multiprocessing
import os
import signal
from types import SimpleNamespace

import pytest
from datasets import load_dataset

from empathic.data_prep.corpora.folder import prepare_folder
from empathic.data_prep.views import DialogueSamples
from empathic.evaluation import replies
from empathic.evaluation.replies import conversation_of, read_replies, seed_of, write_replies
from empathic.evaluation.systems.base import Common, Reply
from empathic.evaluation.systems.open import open_system, read_spec
from empathic.evaluation.systems.ours import EmpathicSystem

SHORT = {"device": "cpu", "max_new_tokens": 6, "batch_size": 2}


@pytest.fixture(scope="module")
def samples(recordings):
    """9 samples of 3 dialogues, of which 3 have a clip."""
    return DialogueSamples(load_dataset(recordings.data, split="validation"))


class Echo:
    """A system that counts what it is asked and tells its seed."""

    def __init__(self, name="echo", batch_size=2, **settings):
        self.name, self.batch_size, self.settings, self.asked = name, batch_size, settings, []

    def reply(self, samples, seeds):
        self.asked += [(sample["dialogue_id"], sample["turn"]) for sample in samples]
        return [Reply(f"seed {seed} beside {len(samples)}", {"tokens": 1}) for seed in seeds]


def write(system, samples, out, **options):
    return write_replies(system, samples, out, progress=False, **options)


def test_a_line_holds_the_reply_and_its_prompt(samples, tmp_path):
    path = write(Echo(), samples, tmp_path, seed=3)
    rows = read_replies(path)
    assert path == tmp_path / "echo.jsonl" and len(rows) == len(samples) == 9
    for row, sample in zip(rows, samples, strict=True):
        assert row["id"] == "/".join(str(sample[n]) for n in ("corpus", "split", "dialogue_id", "turn"))
        assert conversation_of(row) == row["id"].rsplit("/", 1)[0]
        assert row["reply"].startswith(f"seed {seed_of(3, row['id'])} ")
        assert row["reference"] == sample["reply"] and row["emotion"] == sample["emotion"] and row["tokens"] == 1
        assert [m["role"] for m in row["prompt"]] == [m["role"] for m in sample["prompt"]]
        for item, given in zip(row["prompt"][-1]["content"], sample["prompt"][-1]["content"], strict=True):
            if given.get("bytes") is not None:
                assert item == {"type": given["type"], "digest": hashlib.sha256(given["bytes"]).hexdigest()}
            else:
                assert item == given
    assert any(item["type"] == "video" for row in rows for item in row["prompt"][-1]["content"])
    assert len({seed_of(3, row["id"]) for row in rows}) == 9 and seed_of(3, "a") != seed_of(4, "a")


def test_what_is_there_is_not_made_again_and_other_settings_are(samples, tmp_path, caplog):
    first = Echo(temperature=1)
    path = write(first, samples, tmp_path)
    content = path.read_bytes()
    again = Echo(temperature=1)
    assert write(again, samples, tmp_path).read_bytes() == content and again.asked == []
    for other, options in ((Echo(temperature=2), {}), (Echo(temperature=1), {"seed": 1})):
        write(other, samples, tmp_path, **options)
        assert len(other.asked) == 9
    assert "other settings" in caplog.text
    back = Echo(temperature=1)
    assert write(back, samples, tmp_path).read_bytes() == content and back.asked == []


class Unreliable(Echo):
    """An endpoint that gives no reply to some turns."""

    def __init__(self, fails, **settings):
        super().__init__(batch_size=4, **settings)
        self.fails = fails

    def reply(self, samples, seeds):
        replies = super().reply(samples, seeds)
        failed = Reply("", {"finish_reason": "failed"})
        return [failed if s["dialogue_id"] in self.fails else r for s, r in zip(samples, replies, strict=True)]


def test_what_an_endpoint_failed_to_give_is_asked_for_again(samples, tmp_path):
    names = list(dict.fromkeys(sample["dialogue_id"] for sample in samples))
    rows = read_replies(write(Unreliable(names[1:]), samples, tmp_path))
    assert [row["reply"] == "" for row in rows] == [False] * 3 + [True] * 6
    once_more = Unreliable(names[2:])
    rows = read_replies(write(once_more, samples, tmp_path))
    assert [name for name, _ in once_more.asked] == [names[1]] * 3 + [names[2]] * 3  # and none of the first
    assert [row["reply"] == "" for row in rows] == [False] * 6 + [True] * 3
    # What was there is kept if it fails now.
    still = read_replies(write(Unreliable(names), samples, tmp_path))
    assert still == rows
    assert all(row["reply"] for row in read_replies(write(Unreliable([]), samples, tmp_path)))


def test_more_samples_begin_with_the_same_batches(samples, recordings, tmp_path):
    fewer = DialogueSamples(load_dataset(recordings.data, split="validation"))
    fewer.places = fewer.places[:5]
    assert len(read_replies(write(Echo(), fewer, tmp_path))) == 5
    system = Echo()
    content = write(system, samples, tmp_path).read_bytes()
    assert len(system.asked) == 5  # the fifth had stood alone in its batch
    assert content == write(Echo(), samples, tmp_path / "new").read_bytes()


def test_changed_texts_are_answered_anew(recordings, tmp_path):
    rows = load_dataset(recordings.data, split="validation")
    write(Echo(), DialogueSamples(rows), tmp_path)
    changed = rows.map(lambda row: {"text": row["text"].upper()}, load_from_cache_file=False)
    system = Echo()
    written = read_replies(write(system, DialogueSamples(changed), tmp_path))
    assert len(system.asked) == 9 and written[0]["reference"].isupper()


@pytest.mark.parametrize("embed", [False, True])
def test_replies_to_a_clip_that_was_replaced_are_made_again(tmp_path, write_media, grey_frames, tone, embed):
    raw, data, out = tmp_path / "raw", tmp_path / "data", tmp_path / "out"
    raw.mkdir()
    lines = []
    for number in range(3):
        write_media(raw / f"{number}.mp4", frames=grey_frames(5), samples=tone(0.4, frequency=300 + number))
        for turn in range(2):
            line = {"dialogue_id": f"d{number}", "turn": turn, "speaker": "ab"[turn], "text": "hello", "split": "test"}
            lines.append(json.dumps(line | ({} if turn else {"file_name": f"{number}.mp4"})))
    (raw / "metadata.jsonl").write_text("\n".join(lines))

    def again(**options):
        prepare_folder(raw, data, embed=embed, progress=False)
        samples = DialogueSamples(load_dataset(str(data), split="test", cache_dir=str(tmp_path / "cache")))
        systems = Echo("both", 1), Echo("video", 1), Echo("text", 1)
        systems[1].clip_kinds, systems[2].clip_kinds = ("video",), ()
        rows = [read_replies(write(system, samples, out)) for system in systems]
        return [[name for name, _ in system.asked] for system in systems], rows

    asked, rows = again()
    assert asked == [["d0", "d1", "d2"]] * 3
    content = hashlib.sha256((raw / "1.mp4").read_bytes()).hexdigest()
    assert [row[1].get("clips") for row in rows] == [{"audio": content, "video": content}, {"video": content}, None]
    assert again()[0] == [[], [], []]
    os.utime(raw / "1.mp4")
    assert again()[0] == [[], [], []]  # another time, the same content

    write_media(raw / "1.mp4", frames=grey_frames(5), samples=tone(0.4, frequency=900))
    asked, rows = again()
    # The prompt of an embedded clip names its content, so that its line changes even for a system without clips.
    assert asked == [["d1"], ["d1"], ["d1"] if embed else []]
    assert rows[0][1]["clips"]["audio"] == hashlib.sha256((raw / "1.mp4").read_bytes()).hexdigest() != content
    if not embed:
        (raw / "1.mp4").unlink()
        samples = DialogueSamples(load_dataset(str(data), split="test", cache_dir=str(tmp_path / "cache")))
        system = Echo("both", 1)
        assert read_replies(write(system, samples, out))[1]["clips"] == {"audio": None, "video": None}
        assert [name for name, _ in system.asked] == ["d1"]


def test_the_clips_that_a_system_gets_are_those_of_its_kind(base_folder):
    kinds = {
        f"empathic:{base_folder}": ("audio", "video"),
        f"empathic:{base_folder},media=false": (),
        "chat:a": (),
        "audio:a": ("audio",),
        "video:a": ("video",),
        "openai:a@http://localhost/v1,key=none": (),
        "openai:a@http://localhost/v1,key=none,media=frames": ("video",),
    }
    assert {spec: open_system(f"a={spec}", device="cpu").clip_kinds for spec in kinds} == kinds


def test_a_list_of_samples_is_taken_too_but_no_name_twice(samples, tmp_path):
    listed = [samples[place] for place in range(3)]
    assert len(read_replies(write(Echo(), listed, tmp_path))) == 3
    with pytest.raises(ValueError, match=f"have the id {listed[0]['corpus']}/.*/1"):
        write(Echo(), [listed[0], listed[0]], tmp_path)


class Torn:
    """A file whose third write ends after one line and a half, and with it the process."""

    def __init__(self, file):
        self.file, self.writes = file, 0

    def write(self, text):
        self.writes += 1
        if self.writes == 3:
            self.file.write(text[: text.index("\n") + 40])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        self.file.write(text)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def die_in_the_middle(folder, samples, out):
    new_part = replies._new_part
    replies._new_part = lambda *args: Torn(new_part(*args))
    write(EmpathicSystem("ours", folder, Common(**SHORT)), samples, out)


def test_a_killed_run_goes_on_to_the_same_bytes(base_folder, samples, tmp_path):
    process = multiprocessing.get_context("fork").Process(
        target=die_in_the_middle, args=(base_folder, samples, tmp_path / "killed")
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "killed" / "ours.jsonl").exists()
    (part,) = (tmp_path / "killed" / "ours.parts").iterdir()
    assert part.read_bytes().count(b"\n") == 5 and not part.read_bytes().endswith(b"\n")  # of batches of two
    asked = []
    system = EmpathicSystem("ours", base_folder, Common(**SHORT))
    reply = system.reply
    system.reply = lambda samples, seeds: asked.append(len(samples)) or reply(samples, seeds)
    resumed = write(system, samples, tmp_path / "killed").read_bytes()
    assert asked == [2, 2, 1]  # 4 of 9 were there
    system.reply = reply
    assert resumed == write(system, samples, tmp_path / "whole").read_bytes()
    assert any(row["reply"] for row in read_replies(tmp_path / "whole" / "ours.jsonl"))


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_write_the_same_file(samples, tmp_path, world):
    """Each with its share of the batches, here one after the other: at a barrier the next one runs."""
    alone = write(Echo(), samples, tmp_path / "alone").read_bytes()
    systems, threads = [Echo() for _ in range(world)], []
    import threading

    barrier = threading.Barrier(world)
    for rank, system in enumerate(systems):
        state = SimpleNamespace(process_index=rank, num_processes=world, wait_for_everyone=barrier.wait)
        threads.append(
            threading.Thread(target=write, args=(system, samples, tmp_path / "many"), kwargs={"accelerator": state})
        )
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "many" / "echo.jsonl").read_bytes() == alone
    asked = [place for system in systems for place in system.asked]
    assert len(asked) == len(set(asked)) == 9 and all(system.asked for system in systems)


# ------------------------------------------------------------------------------------------------------------ systems


def test_sampled_replies_belong_to_their_seed(base_folder, samples):
    common = Common(device="cpu", max_new_tokens=8, temperature=1.5)
    system, three = EmpathicSystem("s", base_folder, common), [samples[i] for i in range(3)]
    texts = [reply.text for reply in system.reply(three, [1, 2, 3])]
    assert [reply.text for reply in system.reply(three, [1, 2, 3])] == texts
    assert [reply.text for reply in system.reply(three, [4, 5, 6])] != texts
    assert system.reply(three[1:2], [2])[0].text == texts[1]  # whoever shares its batch


def test_what_a_system_is_shown(base_folder, samples):
    """Each setting changes the prompt's length as it should: media and memory are vectors, text is words."""
    sample = next(
        samples[i] for i in range(9) if samples[i]["turn"] == 3 and len(samples[i]["prompt"][-1]["content"]) > 1
    )

    def tokens(**options):
        system = EmpathicSystem("s", base_folder, Common(device="cpu", max_new_tokens=1), **options)
        return system.reply([sample], [0])[0].extra["prompt_tokens"]

    whole, deaf, bare = tokens(), tokens(media=False), tokens(history="none", media=False)
    assert bare < deaf < whole
    assert tokens(history="text", media=False) > deaf


def test_a_clip_that_cannot_be_read_is_noted_and_its_row_kept(base_folder, samples, tmp_path):
    listed = [samples[place] for place in range(9) if len(samples[place]["prompt"][-1]["content"]) == 3][:1]
    bad = json.loads(json.dumps(listed[0], default=lambda value: None))
    (tmp_path / "bad.mp4").write_bytes(b"no film at all" * 9)
    for item in bad["prompt"][-1]["content"]:
        if item["type"] == "video":
            item |= {"path": str(tmp_path / "bad.mp4"), "bytes": None}
        if item["type"] == "audio":
            item |= {"path": str(tmp_path / "missing.wav"), "bytes": None}
    speechless = {**bad, "turn": 99, "prompt": [{**bad["prompt"][-1], "content": bad["prompt"][-1]["content"][:2]}]}
    fine = {**listed[0], "turn": 98}
    system = EmpathicSystem("ours", base_folder, Common(**SHORT))
    rows = read_replies(write(system, [bad, speechless, fine], tmp_path / "out"))
    assert [row["id"].rsplit("/", 1)[1] for row in rows] == [str(bad["turn"]), "99", "98"]
    assert "bad.mp4" in rows[0]["note"] and "missing.wav" in rows[0]["note"] and rows[0]["tokens"] > 0
    assert rows[1]["reply"] == "" and "no reply" in rows[1]["note"]
    assert "note" not in rows[2]
    deaf = EmpathicSystem("ours", base_folder, Common(**SHORT), media=False)
    assert rows[0]["reply"] == deaf.reply([bad], [0])[0].text


def test_the_oldest_turns_make_room(base_folder, samples):
    long = {**samples[0], "prompt": [{"role": "user", "name": "clara", "content": "hello " * 600}] * 2}
    short = {"role": "user", "name": "clara", "content": [{"type": "text", "text": "how are you"}]}
    system = EmpathicSystem("s", base_folder, Common(**SHORT), history="text")
    seen = system.reply([{**long, "prompt": [*long["prompt"], short]}], [0])[0]
    assert "1 oldest turns are left out" in seen.extra["note"] and seen.extra["prompt_tokens"] <= 1024 - 6
    nothing = system.reply([{**long, "prompt": [{**short, "content": "hello " * 2000}]}], [0])[0]
    assert nothing.text == "" and "room for 1018" in nothing.extra["note"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("runs/epo", "is not a system spec. Write NAME=KIND:TARGET"),
        ("a=magic:x", "unknown kind 'magic'"),
        ("a=empathic:x,colour=red", "unknown option 'colour'"),
        ("a=empathic:x,media=perhaps", "media: 'perhaps' is not true or false"),
        ("a=empathic:x,history=half", "the history is 'half'"),
        ("a=empathic:x,batch_size=0", "at least 1"),
        ("a=empathic:x,top_p=0.5", "Give both"),
        ("a b=empathic:x", "the name 'a b' is used in file names"),
    ],
)
def test_specs_that_cannot_be_read(spec, message):
    with pytest.raises(ValueError, match=message):
        open_system(spec)


def test_a_spec_says_what_is_decided(base_folder):
    assert read_spec("empathic:org/some-model")[0] == "some-model"
    assert read_spec("openai:m@http://host:1/v1") == ("m", "openai", "m@http://host:1/v1", {})
    system = open_system(
        f"x=empathic:{base_folder},history=text,media=false,max_new_tokens=9", batch_size=3, device="cpu"
    )
    assert system.name == "x" and system.batch_size == 3
    settings = system.settings
    assert (settings["history"], settings["media"], settings["max_new_tokens"]) == ("text", False, 9)
    assert json.loads(json.dumps(settings)) == settings and "device" not in settings
    assert "model" not in vars(system.checkpoint)  # nothing is loaded before the first reply
