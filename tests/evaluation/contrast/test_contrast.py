"""Contrast evaluation: which clips are paired, what a system gets of them, and scores beside numbers worked by hand."""

import json
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import load_dataset

from empathic import quickstart
from empathic.cli import main
from empathic.data_prep.corpora.folder import prepare_folder
from empathic.evaluation.contrast.appropriateness import GO_EMOTIONS_FITS, PROBES, read_appropriateness
from empathic.evaluation.contrast.conditions import CONDITIONS, Blanks, blank_clip, distinct_conditions, treatment
from empathic.evaluation.contrast.inputs import ContrastInputs
from empathic.evaluation.contrast.likelihood import ReplyScorer
from empathic.evaluation.contrast.scores import METRICS, ContrastStatistics, ReplyFits, by_emotion, pair_scores
from empathic.evaluation.contrast.table import ContrastOptions, evaluate_contrast
from empathic.evaluation.contrast.utterances import ContrastClip, ContrastPrompts, ContrastUtterance, find_utterances
from empathic.evaluation.replies import read_replies
from empathic.evaluation.reply_options import CONDITIONS as OFFERED
from empathic.evaluation.report.build import write_report
from empathic.evaluation.statistics_of_replies import Draws
from empathic.media_empathic import load_audio, load_video
from empathic.tiny.corpus import contrast_rows, write_contrast_corpus
from empathic.tiny.emotion_classifier import train_emotion_classifier

EMOTIONS = ["angry", "disgust", "fearful", "happy", "neutral", "sad", "surprise"]
FRAMES = 4


@pytest.fixture(scope="module", autouse=True)
def forget_the_device():
    yield
    PartialState._reset_state()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    train_emotion_classifier(folder, ["a b", "c d"], ["happy", "sad"], steps=1, progress=False)
    return str(folder)


def prepared(folder, lines, **options):
    raw, data = folder / "raw", folder / "data"
    (raw / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    prepare_folder(raw, data, progress=False, **options)
    return str(data)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory, write_media, grey_frames, tone):
    """
    Two speakers say two sentences; ana with three emotions, of happy two takes, ben with two emotions; and one sentence
    that ben says once. Without replies, as in RAVDESS.
    """
    folder = tmp_path_factory.mktemp("spoken")
    (folder / "raw").mkdir()
    lines = []

    def say(speaker, text, emotion, take):
        name = f"{speaker}-{emotion}-{take}-{text.split()[0]}"
        frames, sound = grey_frames(FRAMES) + len(lines), tone(0.3 + 0.02 * len(lines), frequency=200 + 40 * len(lines))
        write_media(folder / "raw" / f"{name}.mp4", frames=frames, samples=sound)
        line = {"dialogue_id": name, "turn": 0, "utterance_id": name, "speaker": speaker, "text": text}
        lines.append({**line, "split": "test", "emotion": emotion, "file_name": f"{name}.mp4"})

    for text in ("kids are talking", "dogs are sitting"):
        for emotion, takes in (("sad", 1), ("happy", 2), ("angry", 2)):
            for take in range(takes):
                say("ana", text, emotion, take)
        for emotion in ("neutral", "fearful"):
            say("ben", text, emotion, 0)
    say("ben", "birds fly", "happy", 0)
    return prepared(folder, lines)


@pytest.fixture(scope="module")
def swapped(tmp_path_factory, write_media, grey_frames, tone):
    """Three dialogues of the words of one speaker with other words in each, answered by a bot; embedded clips."""
    folder = tmp_path_factory.mktemp("swapped")
    (folder / "raw").mkdir()
    lines = []
    for number, emotion in enumerate(("happy", "sad", "happy", "angry")):
        name = f"{number}.mp4"
        write_media(folder / "raw" / name, frames=grey_frames(FRAMES) + 20 * number, samples=tone(0.4))
        for turn, text in enumerate(("hello", "hi", f"words {number}", f"reply {number}")):
            line = {"dialogue_id": f"d{number}", "turn": turn, "speaker": ("clara", "bot")[turn % 2], "text": text}
            about = {"emotion": emotion, "file_name": name} if turn == 2 else {}
            lines.append({**line, "split": "test", **about})
    return prepared(folder, lines, embed=True)


def prompts_of(data, speakers=None):
    return ContrastPrompts(load_dataset(data, split="test"), speakers)


# ------------------------------------------------------------------------------------------------------- which clips


def test_takes_of_the_same_words_by_the_same_speaker_belong_together(spoken):
    prompts = prompts_of(spoken)
    utterances, found = find_utterances(prompts)
    assert found["source"] == "same" and found["clips"] == 15
    shown = [[clip.name for clip in each.clips] for each in utterances]
    assert sorted(shown) == sorted(
        [
            *([f"ana-{e}-0-{w}" for e in ("angry", "happy", "sad")] for w in ("kids", "dogs")),
            *([f"ana-{e}-1-{w}" for e in ("angry", "happy")] for w in ("kids", "dogs")),
            *([f"ben-{e}-0-{w}" for e in ("fearful", "neutral")] for w in ("kids", "dogs")),
        ]
    )
    assert found["left_out"] == {"no clip of the same words has another emotion": 1}
    assert all(clip.recorded and clip.reply == "" for each in utterances for clip in each.clips)
    assert Counter(len(each.pairs()) for each in utterances) == {6: 2, 2: 4}
    assert len({each.name for each in utterances}) == len(utterances)


def test_elsewhere_clips_of_the_same_speaker_are_swapped(swapped):
    prompts = prompts_of(swapped, ["bot"])
    utterances, found = find_utterances(prompts)
    assert (
        found["source"] == "swap" and len(utterances) == 4 and found["left_out"] == {"it has no emotion or no clip": 4}
    )
    for each in utterances:
        own, *others = each.clips
        number = own.reply.split()[1]
        assert own.recorded and prompts.prompt(each)[-1]["content"][-1]["text"] == f"words {number}"
        assert len(others) == 2 and not any(clip.recorded or clip.reply for clip in others)
        assert len({clip.emotion for clip in each.clips}) == 3
        assert each.pairs() == [(0, 1), (0, 2)]
    fewer, _ = find_utterances(prompts, swaps=1, limit=2)
    assert len(fewer) == 2 and all(len(each.clips) == 2 for each in fewer)
    assert fewer == find_utterances(prompts, swaps=1, limit=2)[0]
    with pytest.raises(ValueError, match="No utterance has clips of two emotions"):
        find_utterances(prompts, "same")
    with pytest.raises(ValueError, match="is 'any'; it is one of auto, same, swap"):
        find_utterances(prompts, "any")


def test_the_tiny_corpus_says_each_sentence_with_every_emotion(tmp_path):
    rows = contrast_rows(3)
    texts = Counter(row["text"] for row in rows if row["speaker"] == "user")
    assert set(texts.values()) == {7} and len(texts) == 3
    assert write_contrast_corpus(tmp_path / "raw", num=2, progress=False)["clips"] == 14
    prepare_folder(tmp_path / "raw", tmp_path / "data", progress=False)
    utterances, found = find_utterances(prompts_of(str(tmp_path / "data"), ["assistant"]))
    assert found["source"] == "same"
    assert [[clip.emotion for clip in each.clips] for each in utterances] == [EMOTIONS] * 2
    assert all(clip.reply for each in utterances for clip in each.clips)
    # The person is the same in all clips of a sentence: the pixel in the corner has the background's color.
    corners = [
        load_video(prompts_of(str(tmp_path / "data")).media(clip.row, "video"), 1)[0, 0, 0].astype(int)
        for clip in utterances[0].clips
    ]
    assert np.ptp(corners, axis=0).max() <= 12


# ------------------------------------------------------------------------------------------- what a system gets of them


def test_conditions_that_give_the_same_are_one():
    both, sound = ("audio", "video"), ("audio",)
    assert tuple(CONDITIONS) == OFFERED
    assert distinct_conditions(list(CONDITIONS), both) == list(CONDITIONS)
    assert distinct_conditions(list(CONDITIONS), sound) == ["full", "absent", "silence"]
    assert distinct_conditions(list(CONDITIONS), ("video",)) == ["full", "absent", "gray"]
    assert distinct_conditions(list(CONDITIONS), ()) == ["full"]
    assert treatment("silence", both) == (("audio", "blank"), ("video", "own"))
    assert treatment("video", sound) == ()


def test_blanks_have_the_length_and_the_size_of_the_clip(tmp_path, write_media, grey_frames, tone):
    path = str(write_media(tmp_path / "a.mp4", frames=grey_frames(5, 46, 60), samples=tone(0.5)))
    silence = blank_clip({"type": "audio", "path": path}, tmp_path / "blanks")
    sound = load_audio(silence)
    assert not sound.any() and len(sound) / 16000 == pytest.approx(
        len(load_audio({"type": "audio", "path": path})) / 16000, abs=0.05
    )
    gray = blank_clip({"type": "video", "path": path}, tmp_path / "blanks")
    frames = load_video(gray, 4)
    assert frames.shape == (4, 46, 60, 3) and np.ptp(frames) <= 4
    blanks = Blanks(tmp_path / "blanks")
    lost = {"type": "audio", "path": str(tmp_path / "none.wav")}
    assert blanks.of("x", "audio", [lost, {"type": "audio", "path": path}]) == silence and blanks.problems == {}
    assert blanks.of("y", "audio", [lost, lost]) is None and list(blanks.problems) == ["y"]


@pytest.mark.parametrize(
    ("kinds", "count", "conditions"),
    [
        ((), 6, ["full"]),
        (("audio",), 14 + 6 + 6, ["full", "absent", "silence"]),
        (("audio", "video"), 6 * 2 + 5 * 14, list(CONDITIONS)),
    ],
)
def test_what_a_system_cannot_tell_apart_is_one_input(spoken, tmp_path, kinds, count, conditions):
    prompts = prompts_of(spoken)
    utterances, _ = find_utterances(prompts)
    inputs = ContrastInputs(prompts, utterances, list(CONDITIONS), kinds, Blanks(tmp_path))
    assert inputs.conditions == conditions and len(inputs) == count
    for condition in inputs.conditions:
        for utterance, places in zip(utterances, inputs.places[condition], strict=True):
            for clip, place in zip(utterance.clips, places, strict=True):
                sample = inputs[place]
                content = sample["prompt"][-1]["content"]
                assert content[-1]["text"] in ("kids are talking", "dogs are sitting")
                assert {item["type"] for item in content[:-1]} == {kind for kind, _ in treatment(condition, kinds)}
                for item in content[:-1]:
                    own = clip.name in item["path"]
                    assert own == (dict(treatment(condition, kinds))[item["type"]] == "own")
                assert sample["seeded_by"] == utterance.name
                assert sample["emotion"] == (
                    clip.emotion if any(clip.name in i.get("path", "") for i in content) else None
                )
    ids = [inputs[place]["turn"] for place in range(len(inputs))]
    assert len({(inputs[p]["dialogue_id"], i) for p, i in enumerate(ids)}) == len(inputs)


# -------------------------------------------------------------------------------------------------------------- scores


class Features:
    """The probabilities of happy and sad that each text states, for a classifier of these and five more labels."""

    labels, description = EMOTIONS, "stated in the text"

    def encode(self, texts):
        rows = np.zeros((len(texts), 7), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            happy, sad = map(float, text.split()[:2])
            row[3], row[5], row[4] = happy, sad, 1 - happy - sad
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def fits():
    return ReplyFits(Features(), read_appropriateness(None, EMOTIONS))


def utterance_of(name, *emotions, recorded=None):
    clips = tuple(
        ContrastClip(place, f"{name}{place}", emotion, recorded is None or place < recorded, "")
        for place, emotion in enumerate(emotions)
    )
    return ContrastUtterance(name, 0, "ana", ("audio",), clips)


def test_scores_of_pairs_worked_by_hand():
    utterances = [utterance_of("u", "happy", "sad"), utterance_of("v", "happy", "sad", recorded=1)]
    replies = [["0.8 0.1", "0.5 0.4"], ["0.2 0.2", "0.2  0.2"]]
    likelihoods = [[{"happy": -2.0, "sad": -5.0}, {"happy": -3.0, "sad": -6.0}], [{"happy": -1.0}, None]]
    found = pair_scores(utterances, replies, fits(), likelihoods)
    # Pairs (right, wrong): of u (happy, sad) and (sad, happy); of v only (happy, sad), as its sad clip has other words.
    assert found.values["changed"].tolist() == [1, 1, 0]  # white space is no change
    assert found.values["fit"] == pytest.approx([0.8, 0.4, 0.2])
    assert found.values["movement"] == pytest.approx([0.3, 0.3, 0.0])
    assert found.values["matched"].tolist() == [1, 1, 0.5]
    assert found.values["likelihood"][:2].tolist() == [1.0, -1.0] and np.isnan(found.values["likelihood"][2])
    assert found.values["likelihood_matched"][:2].tolist() == [1.0, 0.0]
    assert found.confusion["happy"] == {**dict.fromkeys([*EMOTIONS, "(empty)"], 0), "happy": 1, "neutral": 1}
    assert found.confusion["sad"]["happy"] == 1  # 0.5 happy, 0.4 sad
    summary = ContrastStatistics(["u", "u", "v"], Draws(resamples=200)).summary(found)
    assert summary["movement"]["mean"] == pytest.approx(0.2) and summary["movement"]["pairs"] == 3
    assert summary["likelihood"]["pairs"] == 2 and summary["likelihood"]["low"] is None  # one utterance
    assert summary["movement"]["low"] <= 0.2 <= summary["movement"]["high"] and summary["matched"]["p"] > 0
    assert by_emotion(utterances, found)["happy"]["fit"] == {"mean": pytest.approx(0.5), "pairs": 2}


def test_a_reply_that_is_the_same_for_all_clips_scores_at_chance():
    utterances = [utterance_of(name, "happy", "sad", "angry", "neutral") for name in "uvw"]
    for texts in (["0.9 0.0"] * 4, ["0.3 0.3"] * 4, [""] * 4):
        found = pair_scores(utterances, [texts] * 3, fits())
        summary = ContrastStatistics([each.name for each in utterances for _ in each.pairs()], Draws()).summary(found)
        for name, (_, chance) in METRICS.items():
            if name in summary and chance is not None:
                assert summary[name]["mean"] == summary[name]["low"] == summary[name]["high"] == chance
        assert "likelihood" not in summary


def test_pairs_whose_emotions_ask_for_the_same_do_not_count_as_matched(tmp_path):
    table = {"fits": {emotion: ["happy"] for emotion in EMOTIONS} | {"sad": {"sad": 0.5}}}
    (tmp_path / "table.json").write_text(json.dumps(table))
    both = ReplyFits(Features(), read_appropriateness(tmp_path / "table.json", EMOTIONS))
    found = pair_scores([utterance_of("u", "happy", "angry", "sad")], [["0.8 0.0", "0.6 0.0", "0.0 0.8"]], both)
    assert np.isnan(found.values["movement"]).sum() == 2 and not np.isnan(found.values["changed"]).any()
    assert np.nansum(found.values["movement"]) == pytest.approx(0.8 + 0.6 + 0.4 + 0.4)  # the weight of sad is a half


def test_the_table_of_what_fits_is_checked(tmp_path):
    go = sorted({label for those in GO_EMOTIONS_FITS.values() for label in those} | {"desire"})
    assert read_appropriateness(None, go).fits["sad"]["caring"] == 1
    assert read_appropriateness(None, ["Anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise"]).fits[
        "fearful"
    ] == {"fear": 1}
    with pytest.raises(
        ValueError, match=r"no default table .* labels good, bad: .* fit angry, .*--appropriateness FILE"
    ):
        read_appropriateness(None, ["good", "bad"])
    path, whole = tmp_path / "t.json", {emotion: ["happy"] for emotion in EMOTIONS}
    for content, message in (
        ("{", "cannot be read as JSON"),
        ('{"a": 1}', 'has no "fits"'),
        (json.dumps({"fits": {"happy": ["happy"]}}), "nothing fits angry, disgust"),
        (json.dumps({"fits": {**whole, "merry": ["happy"]}}), "'merry' is no emotion of a clip"),
        (json.dumps({"fits": {**whole, "sad": ["blue"]}}), "sad: 'blue' is no label of the classifier"),
        (json.dumps({"fits": {**whole, "sad": {"sad": 2}}}), "sad: give a list of labels, or weights from 0 to 1"),
        (json.dumps({"fits": whole, "replies": {"sad": [""]}}), "the replies for sad are"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_appropriateness(path, EMOTIONS)
    path.write_text(json.dumps({"fits": whole, "replies": {"sad": ["oh no"]}}))
    table = read_appropriateness(path, EMOTIONS)
    assert table.replies["sad"] == ["oh no"] and table.replies["happy"] == PROBES["happy"]


# ---------------------------------------------------------------------------------------------------------- likelihood


@pytest.mark.parametrize("packs", [True, False])
def test_likelihoods_are_those_of_the_full_logits(model, processor, clip, tmp_path, packs):
    def prompt(text, *kinds):
        content = [{"type": kind, "path": clip} for kind in kinds]
        earlier = {"role": "user", "name": "clara", "content": "hello there"}
        return processor.prepare([earlier, {"role": "user", "content": [*content, {"type": "text", "text": text}]}])

    prepared = [prompt("how are you", "audio", "video"), prompt("i am fine", "audio"), prompt("what did he say")]
    replies = [["fine thanks", "the old dog", "i am"], ["you"], ["how are you", "how"]]
    scorer = ReplyScorer(model, processor, str(tmp_path))
    scorer._packs = packs
    found = scorer.scores(prepared, replies)
    for inputs, texts, scores in zip(prepared, replies, found, strict=True):
        for text, (logp, count) in zip(texts, scores, strict=True):
            reply = processor.encode_reply(text)
            whole = {**inputs, "input_ids": inputs["input_ids"] + reply}
            with torch.no_grad():
                logits = model(**processor.pad([whole])).logits[0, -len(reply) - 1 : -1].double().log_softmax(-1)
            assert count == len(reply)
            assert logp == pytest.approx(logits[range(len(reply)), reply].sum().item(), abs=1e-4)


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def evaluated(spoken, base_folder, classifier, tmp_path_factory):
    out = tmp_path_factory.mktemp("contrast")
    systems = [f"hears=empathic:{base_folder}", f"text=empathic:{base_folder},media=false"]
    line = ["evaluate", "contrast", *systems, "--data", spoken, f"--classifier={classifier}", f"--output={out}"]
    line += ["--device=cpu", "--max_new_tokens=6", "--resamples=200", "--temperature=1.5", "--batch_size=28"]
    assert main(line) == 0
    return out, line


def test_a_system_without_clips_is_at_chance_even_if_its_replies_are_sampled(evaluated):
    results = json.loads((evaluated[0] / "contrast.json").read_text())
    text, hears = results["systems"]["text"], results["systems"]["hears"]
    assert list(text["conditions"]) == ["full"] and list(hears["conditions"]) == list(CONDITIONS)
    for name, (_, chance) in METRICS.items():
        row = text["conditions"]["full"][name]
        if chance is not None:
            assert row["mean"] == row["low"] == row["high"] == chance
    for condition in ("absent", "blank"):
        assert hears["conditions"][condition]["changed"]["mean"] == 0
        assert hears["conditions"][condition]["likelihood"]["mean"] == 0
    assert hears["conditions"]["full"]["likelihood"]["mean"] != 0 and results["settings"]["likelihood"] == "probes"
    assert results["settings"]["clip_pairs"] == 2 * 6 + 4 * 2 and results["settings"]["pairs"] == "same"
    assert {row["a"] for row in results["comparisons"]} == {"text"}
    assert {row["condition"] for row in results["ablations"]} == set(CONDITIONS) - {"full"}
    assert results["appropriateness"]["fits"]["sad"] == {"sad": 1.0}


def test_every_number_follows_from_what_is_saved(evaluated):
    out, _ = evaluated
    results = json.loads((out / "contrast.json").read_text())
    lines = [json.loads(line) for line in (out / results["utterances"]).read_text().splitlines()]
    for name, system in results["systems"].items():
        rows = {row["id"]: row for row in read_replies(out / system["replies"])}
        for condition, found in system["conditions"].items():
            changed, movement, likelihood = [], [], []
            for line in lines:
                replies = line["systems"][name][condition]
                assert all(rows[each["reply_id"]]["reply"] == each["reply"] for each in replies)
                for a, right in enumerate(line["clips"]):
                    for b in range(len(line["clips"])):
                        if a != b:
                            changed.append(replies[a]["reply"] != replies[b]["reply"])
                            fit = [replies[at]["fits"][right["emotion"]] for at in (a, b)]
                            movement.append(fit[0] - fit[1])
                            logp = [replies[at]["logps"][right["emotion"]] for at in (a, b)]
                            likelihood.append(logp[0] - logp[1])
            assert found["changed"]["mean"] == pytest.approx(np.mean(changed))
            assert found["movement"]["mean"] == pytest.approx(np.mean(movement), abs=1e-9)
            assert found["likelihood"]["mean"] == pytest.approx(np.mean(likelihood), abs=1e-9)
    assert all(clip["media"]["video"]["path"] for line in lines for clip in line["clips"])


def test_the_report_plays_both_clips_side_by_side(evaluated):
    out, _ = evaluated
    text = write_report([out], samples=3).read_text()
    assert text.count('<div class="sides">') == 3 and text.count('<div class="side">') == 6
    assert text.count("data:video/mp4") == 6 and "Contrast, clips side by side: data" in text
    assert "<td" in text and "movement towards the clip" in text and "default table: the reply shares" in text
    report = (out / "report.md").read_text()
    assert "| chance | 0.000 | – | 0.000 | 0.500 | 0.000 | 0.500 |" in report and "bootstrap over utterances" in report
    for title in (
        "Do two systems differ?",
        "Parts of the clip",
        "Does the rest of the clip matter?",
        "Which reply fits",
    ):
        assert title in report


def test_an_example_without_its_file_says_so(evaluated, tmp_path):
    out, _ = evaluated
    (tmp_path / "contrast.json").write_text((out / "contrast.json").read_text())
    assert "Examples: " in write_report([tmp_path]).read_text()


def test_quickstart_compares_its_models(base_folder, classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(
        quickstart, "write_contrast_corpus", lambda to: write_contrast_corpus(to, num=2, progress=False)
    )
    assert quickstart.write_contrasts(tmp_path) == 28
    for arm in quickstart.CONTRAST_ARMS:
        (tmp_path / quickstart.folder_of(arm)).symlink_to(base_folder)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "emotion_classifier").symlink_to(classifier)
    monkeypatch.setattr(quickstart, "CONTRAST_CONDITIONS", ("full",))
    monkeypatch.setattr(quickstart, "CONTRAST_ARMS", ("control", "epo", "text"))
    monkeypatch.setattr(quickstart, "ContrastOptions", lambda **given: ContrastOptions(**given, resamples=50))
    monkeypatch.setattr(quickstart, "evaluate_contrast", partial(evaluate_contrast, max_new_tokens=3))
    found = quickstart.evaluate_contrasts(tmp_path)
    assert list(found["arms"]) == list(quickstart.CONTRAST_ARMS)
    assert [found["arms"]["text"][name]["mean"] for name in quickstart.CONTRAST_METRICS] == [0, 0, 0.5, 0]
    # The same model twice: no difference.
    assert {row["difference"] for row in found["epo_control"].values()} == {0}
    shown = quickstart.contrast_table(found)
    assert "EPO - control" in shown and "+0.000 [+0.000, +0.000]" in shown


def test_another_run_makes_no_reply_and_says_the_same(evaluated, capsys, monkeypatch):
    out, line = evaluated
    before = (out / "contrast.json").read_bytes()
    monkeypatch.setattr("empathic.evaluation.systems.ours.load_model", None)
    assert main(line) == 0
    assert (out / "contrast.json").read_bytes() == before
    shown = capsys.readouterr().out
    assert "the same words spoken with different emotions" in shown and "picture only" in shown and "chance" in shown


def test_swapped_clips_have_true_replies_and_embedded_clips_are_saved(swapped, base_folder, classifier, tmp_path):
    options = ContrastOptions(classifier=classifier, conditions=("full",), resamples=100, reply_speakers=["bot"])
    specs = [f"ours=empathic:{base_folder},max_new_tokens=4"]
    results = evaluate_contrast(specs, [swapped], tmp_path, options, device="cpu", progress=False)[swapped]
    assert results["settings"]["likelihood"] == "reference" and results["settings"]["pairs"] == "swap"
    assert results["systems"]["ours"]["conditions"]["full"]["likelihood"]["pairs"] == 8
    lines = [json.loads(line) for line in (tmp_path / "contrast" / "utterances.jsonl").read_text().splitlines()]
    digests = {clip["media"]["video"]["digest"] for line in lines for clip in line["clips"]}
    assert {file.stem for file in (tmp_path / "contrast" / "clips").iterdir()} == digests and len(digests) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditions": ("loud",)}, "a condition is 'loud'; it is one of full, absent"),
        ({"cluster": "town"}, "cluster is 'town'"),
        ({"swaps": 0}, "swaps is 0; give 1 or more"),
        ({"likelihood": "own"}, "likelihood is 'own'"),
        ({"confidence": 2}, "The confidence is 2"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ContrastOptions(**options)


def test_errors_name_the_remedy(spoken, base_folder, classifier, tmp_path):
    spec = f"a=empathic:{base_folder}"
    for specs, options, message in (
        ([spec, spec], {}, "Two systems have the name a"),
        ([spec], {"classifier": "nobody/nothing"}, "cannot be loaded .* Give a folder"),
        ([spec], {"likelihood": "reference"}, "no utterance has a true reply. Choose probes"),
        (
            [spec],
            {"split": "test", "pairs": "swap", "max_utterances": None, "appropriateness": "none.json"},
            "none.json",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_contrast(specs, [spoken], tmp_path, ContrastOptions(**{"classifier": classifier, **options}))
    with pytest.raises(ValueError, match="The baseline 'b' is not one of the systems a"):
        evaluate_contrast([spec], [spoken], tmp_path, ContrastOptions(classifier=classifier), baseline="b")


def test_an_unreadable_clip_is_noted_and_the_others_count(spoken, base_folder, classifier, tmp_path):
    from datasets import Dataset

    rows = load_dataset(spoken, split="test").to_list()
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no clip" * 50)
    rows[0]["audio"] = rows[0]["video"] = {"path": str(broken), "bytes": None}
    Dataset.from_list(rows).to_parquet(tmp_path / "data" / "test.parquet")
    options = ContrastOptions(classifier=classifier, resamples=50, conditions=("silence",), likelihood="none")
    results = evaluate_contrast(
        [f"a=empathic:{base_folder},max_new_tokens=3"], [str(tmp_path / "data")], tmp_path / "out", options,
        device="cpu", progress=False,
    )[str(tmp_path / "data")]  # fmt: skip
    assert any("broken.mp4" in note["note"] for note in results["systems"]["a"]["notes"])
    assert results["blanks_missing"] == {}  # it is made like another clip of the utterance
    assert results["systems"]["a"]["conditions"]["full"]["changed"]["pairs"] == 20
    assert results["settings"]["clips"] == 14
