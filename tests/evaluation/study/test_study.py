"""
The human evaluation: files, server and analysis.

Its design: test_study_design.py, clips: test_study_clips.py, the page: test_study_page.py.
"""

import hashlib
import http.client
import json
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from empathic.cli import main
from empathic.evaluation.study.agreement import alpha, coincidences
from empathic.evaluation.study.analysis import analyze
from empathic.evaluation.study.answers import AnswerStore, read_answers
from empathic.evaluation.study.build import Exclusion, StudyOptions, build
from empathic.evaluation.study.replies import StudyError, read_replies
from empathic.evaluation.study.report import markdown, write
from empathic.evaluation.study.server import StudyServer

SYSTEMS = ("zebra-7b", "quokka")


@pytest.fixture(scope="module")
def clip(tmp_path_factory, write_media, grey_frames, tone):
    path = tmp_path_factory.mktemp("clips") / "secret_corpus.mp4"
    return write_media(path, frames=grey_frames(10), samples=tone(1.0))


@pytest.fixture
def write_replies(tmp_path, clip):
    """A function that writes one file a system, `count` conversations each, and gives their paths."""

    def make(count=4, systems=SYSTEMS, path=clip, **more):
        files = []
        for system in systems:
            file = tmp_path / f"{system}.jsonl"
            rows = [
                {
                    "id": f"talk-{i}",
                    "prompt": [
                        {"role": "system", "content": "Be kind."},
                        {"role": "user", "name": "Ann", "content": f"No news {i}?"},
                        {
                            "role": "user",
                            "content": [
                                {"type": "video", "path": str(path)},
                                {"type": "text", "text": "They said no."},
                            ],
                        },
                    ],
                    "reply": f"Reply {i} by {systems.index(system)}\u2028 of it.",
                    "reference": f"True {i}.",
                    **more,
                }
                for i in range(count)
            ]
            file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            files.append(str(file))
        return files

    return make


@pytest.fixture
def study(tmp_path, write_replies):
    """A function that builds a study and gives its folder and its key."""

    def make(count=4, systems=SYSTEMS, **options):
        options = {"conversations": count, "raters": 4, "checks": 1, **options}
        folder = tmp_path / "study"
        return folder, build(write_replies(count, systems), folder, StudyOptions(**options))

    return make


# ------------------------------------------------------------------------------------------------- replies and files


def test_replies_are_joined_by_id(tmp_path, write_replies):
    one, other = map(Path, write_replies(4))
    rows = [json.loads(line) for line in other.read_text().split("\n") if line]
    rows[2]["prompt"][1]["content"] = "Something else."
    rows[3]["prompt"][2]["content"] = "They said no."  # the same words, no clip
    other.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    found, left_out = read_replies([f"mine={one}", str(other)])
    assert [conversation.id for conversation in found] == ["talk-1", "talk-3"]
    assert found[0].replies == {"mine": "Reply 1 by 0\u2028 of it.", "quokka": "Reply 1 by 1\u2028 of it."}
    assert found[1].prompt[2]["content"][0]["type"] == "video"
    assert left_out == [
        {"id": "talk-0", "reason": "no reply from quokka"},
        {"id": "talk-2", "reason": "the prompt of mine differs from that of quokka"},
    ]


def test_a_line_may_name_its_system(tmp_path):
    file = tmp_path / "all.jsonl"
    rows = [{"id": 1, "system": name, "prompt": [{"role": "user", "content": "hi"}], "reply": name} for name in "ab"]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert read_replies([str(file)])[0][0].replies == {"a": "a", "b": "b"}


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "bad.jsonl:2: not JSON"),
        ("[]", "bad.jsonl:2: not an object"),
        ('{"id": 1, "prompt": [{"role": "user", "content": "hi"}], "reply": null}', "bad.jsonl:2: its reply is None"),
        ('{"id": 1, "prompt": [], "reply": ""}', "bad.jsonl:2: its prompt must be"),
        ('{"id": 1, "prompt": [{"role": "user"}], "reply": ""}', "bad.jsonl:2: a message of its prompt"),
        ('{"id": "a", "prompt": [{"role": "user", "content": "hi"}], "reply": ""}', "has a second reply to 'a'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"id": "a", "prompt": [{"role": "user", "content": "hi"}], "reply": "x"}\n' + line + "\n")
    with pytest.raises(StudyError, match=words):
        read_replies([str(file)])


def test_raters_are_given_nothing_that_names_a_system(tmp_path, write_replies):
    folder = tmp_path / "study"
    options = StudyOptions(conversations=3, raters=3, checks=1, reference=True)
    key = build(write_replies(4, seconds_of_work=12), folder, options, static=True)
    assert key["systems"] == [*SYSTEMS, "reference"]
    given = {path for part in ("raters", "media", "static") for path in (folder / part).rglob("*") if path.is_file()}
    assert len(given) == 3 + 3 + 3 + 3
    clips_of_key = [conversation["prompt"][2]["content"][0]["path"] for conversation in key["conversations"].values()]
    assert all("secret_corpus" in path for path in clips_of_key)
    for path in given:
        content = path.read_bytes() + str(path.relative_to(folder)).encode()
        for word in (*SYSTEMS, "secret_corpus", "talk-", "Be kind", "seconds_of_work", '"check"', "expected"):
            assert word.encode() not in content, (path, word)
    # The key tells what each code is, and keeps what else the files held.
    for rater, codes in key["raters"].items():
        page = json.loads((folder / "raters" / f"{rater}.json").read_text())
        assert [item["code"] for item in page["items"]] == codes and len(codes) == 3 * 3 + 1
        for item in page["items"]:
            about = key["items"][item["code"]]
            if "system" in about:
                assert item["reply"] == key["conversations"][about["conversation"]]["replies"][about["system"]]
            else:
                label = {1: "bad", 2: "medium", 3: "good"}[about["check"]]
                assert f'"{label}"' in item["reply"]
            said = [message["text"] for message in page["conversations"][item["conversation"]]]
            assert said == [f"No news {about['conversation'][-1]}?", "They said no."]
    assert all(row["rows"]["quokka"]["seconds_of_work"] == 12 for row in key["conversations"].values())


def test_the_seed_gives_the_design_and_not_the_codes(tmp_path, write_replies):
    files, keys = write_replies(6), []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        keys.append(build(files, tmp_path / name, StudyOptions(conversations=3, raters=2, seed=seed)))
    design = [
        [[(key["items"][code]["conversation"], key["items"][code].get("system")) for code in codes]
         for codes in key["raters"].values()]
        for key in keys
    ]  # fmt: skip
    assert design[0] == design[1] != design[2]
    assert not set(keys[0]["raters"]) & set(keys[1]["raters"])
    assert not set(keys[0]["items"]) & set(keys[1]["items"])


def test_a_conversation_whose_clip_is_broken_is_replaced(tmp_path, write_replies):
    files = write_replies(3)
    for file in map(Path, files):
        rows = [json.loads(line) for line in file.read_text().split("\n") if line]
        rows[1]["prompt"][2]["content"][0]["path"] = str(tmp_path / "missing.mp4")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    key = build(files, tmp_path / "study", StudyOptions(conversations=2, raters=2))
    assert set(key["conversations"]) == {"talk-0", "talk-2"} and len(list((tmp_path / "study/media").iterdir())) == 2
    with pytest.raises(StudyError, match=r"only 2 conversations for a study of 3; 1 are left out.*missing\.mp4"):
        build(files, tmp_path / "more", StudyOptions(conversations=3, raters=2))
    assert not list(tmp_path.glob("more*"))
    key = build(files, tmp_path / "all", StudyOptions(conversations=None, raters=2))
    assert len(key["conversations"]) == 2 and "missing.mp4" in key["left_out"][0]["reason"]


def test_a_clip_that_was_replaced_after_the_replies_is_not_judged(tmp_path, write_replies, clip):
    content = hashlib.sha256(Path(clip).read_bytes()).hexdigest()
    files = write_replies(3, clips={"video": content})
    rows = [json.loads(line) for line in Path(files[1]).read_text().split("\n") if line]
    rows[1]["clips"] = {"video": "0" * 64}
    del rows[2]["clips"]  # a system without clips
    Path(files[1]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    key = build(files, tmp_path / "study", StudyOptions(conversations=None, raters=2))
    assert set(key["conversations"]) == {"talk-0", "talk-2"} and "was replaced" in key["left_out"][0]["reason"]


def test_a_study_is_never_written_over(tmp_path, write_replies):
    folder = tmp_path / "study"
    build(write_replies(), folder, StudyOptions(conversations=2))
    before = (folder / "key.json").read_bytes()
    with pytest.raises(StudyError, match="never overwritten"):
        build(write_replies(), folder, StudyOptions(conversations=2))
    assert (folder / "key.json").read_bytes() == before


# ----------------------------------------------------------------------------------------------------------- answers


def _line(rater, item, question="semantics", score=3, **more):
    return {
        "rater": rater,
        "item": item,
        "question": question,
        "score": score,
        "time": "2025-01-01T10:00:00.000Z",
        "seconds": 9.5,
        "played": 3.0,
        **more,
    }


def _store(folder):
    studies = {path.stem: json.loads(path.read_text()) for path in (folder / "raters").glob("*.json")}
    return AnswerStore(folder / "answers", studies)


def test_an_answer_after_a_crash_starts_its_own_line(study):
    folder, key = study()
    store, (rater, items) = _store(folder), next(iter(key["raters"].items()))
    store.add(rater, _line(rater, items[0], score=1))
    file = folder / "answers" / f"{rater}.jsonl"
    with open(file, "ab") as torn:
        torn.write(b'{"rater": "' + rater.encode()[:4])
    store.add(rater, _line(rater, items[1], score=2))
    store.add(rater, _line(rater, items[0], score=3))
    lines, problems = read_answers(file)
    assert [line["score"] for line in lines] == [1, 2, 3] and len(problems) == 1 and ":2:" in problems[0]
    assert store.latest(rater) == {items[0]: {"semantics": 3}, items[1]: {"semantics": 2}}
    assert all(line["received"] for line in lines)


def test_many_at_once_lose_nothing(study):
    folder, key = study()
    store, jobs = _store(folder), []
    for rater, items in key["raters"].items():
        for question in ("semantics", "empathy"):
            jobs.append((rater, items, question))

    def answer(rater, items, question):
        for item in items:
            store.add(rater, _line(rater, item, question))

    threads = [threading.Thread(target=answer, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rater, items in key["raters"].items():
        lines, problems = read_answers(folder / "answers" / f"{rater}.jsonl")
        assert not problems and len(lines) == 2 * len(items)
        assert {line["item"] for line in lines} == set(items)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"item": "0" * 16}, "not given"),
        ({"item": ["a"]}, "not given"),
        ({"question": "beauty"}, "was not asked"),
        ({"score": 4}, "not on the scale"),
        ({"score": True}, "not on the scale"),
        ({"score": "3"}, "not on the scale"),
        ({"seconds": float("nan")}, "number of seconds"),
        ({"played": -1}, "number of seconds"),
        ({"rater": "other"}, "from this rater"),
        ({"more": "x"}, "unknown fields: more"),
    ],
)
def test_what_is_no_answer_is_refused(study, change, words):
    folder, key = study()
    rater, items = next(iter(key["raters"].items()))
    with pytest.raises(StudyError, match=words):
        _store(folder).add(rater, {**_line(rater, items[0]), **change})
    assert not list((folder / "answers").iterdir())


# ------------------------------------------------------------------------------------------------------------ server


@pytest.fixture
def served(study):
    folder, key = study()
    with StudyServer(folder, port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, key, server
        server.shutdown()


def _ask(server, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def test_pages_come_with_a_policy_and_without_the_key(served):
    folder, key, server = served
    rater, items = next(iter(key["raters"].items()))
    status, headers, body = _ask(server, "GET", f"/r/{rater}")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"
    assert all(name.encode() not in body for name in SYSTEMS) and items[0].encode() in body
    assert f"http://127.0.0.1:{server.server_address[1]}/r/{rater}" == server.links()[0]
    clip = next((folder / "media").iterdir()).name
    paths = ["/key.json", "/r/", f"/r/{rater}.json", f"/raters/{rater}.json", "/media/", f"/answers/{rater}.jsonl"]
    for step in ("..", "%2e%2e", "..%2f..", "....//"):
        paths += [f"/media/{step}/key.json", f"/media/{clip}/{step}/{step}/key.json", f"/{step}/key.json"]
        paths += [f"/r/{step}/key.json", f"/media/{step}/media/{clip}"]
    paths += [f"/media//{folder}/key.json", f"//{folder}/key.json", "/media/\\..\\key.json"]
    for path in paths:
        assert _ask(server, "GET", path)[0] == 404, path
    assert _ask(server, "GET", "/page.js")[1]["Content-Type"].startswith("text/javascript")
    status, headers, body = _ask(server, "HEAD", f"/r/{rater}")
    assert status == 200 and int(headers["Content-Length"]) > 1000 and body == b""


def test_a_player_can_seek(served):
    folder, _, server = served
    clip = next((folder / "media").iterdir())
    content = clip.read_bytes()
    status, headers, body = _ask(server, "GET", f"/media/{clip.name}")
    assert (status, body, headers["Accept-Ranges"]) == (200, content, "bytes")
    assert headers["Content-Type"] == "video/mp4"
    size = len(content)
    for asked, start, end in (
        ("bytes=0-", 0, size),
        ("bytes=10-19", 10, 20),
        ("bytes=-5", size - 5, size),
        (f"bytes=7-{size * 2}", 7, size),
    ):
        status, headers, body = _ask(server, "GET", f"/media/{clip.name}", headers={"Range": asked})
        assert (status, body) == (206, content[start:end])
        assert headers["Content-Range"] == f"bytes {start}-{end - 1}/{size}"
    assert _ask(server, "GET", f"/media/{clip.name}", headers={"Range": f"bytes={size}-"})[0] == 416
    assert _ask(server, "GET", f"/media/{clip.name}", headers={"Range": "lines=1-2"})[::2] == (200, content)


def test_the_server_saves_answers_and_refuses_the_rest(served):
    folder, key, server = served
    rater, items = next(iter(key["raters"].items()))
    other = list(key["raters"])[1]
    kind, place = {"Content-Type": "application/json"}, f"/r/{rater}/answers"
    answer = json.dumps(_line(rater, items[0]))
    assert _ask(server, "POST", place, answer, kind)[::2] == (200, b"saved")
    assert _ask(server, "POST", place, answer, {"Content-Type": "text/plain"})[0] == 415
    assert _ask(server, "POST", f"/r/{other}/answers", answer, kind)[0] == 400
    assert _ask(server, "POST", "/r/nobody/answers", answer, kind)[0] == 404
    assert _ask(server, "POST", place, "{", kind)[0] == 400
    assert _ask(server, "POST", place, "[" * 4000, kind)[0] == 400
    assert _ask(server, "POST", place, "x" * 5000, kind)[0] == 413
    assert _ask(server, "PUT", place, answer, kind)[0] == 501
    assert [path.name for path in (folder / "answers").iterdir()] == [f"{rater}.jsonl"]
    assert len(read_answers(folder / "answers" / f"{rater}.jsonl")[0]) == 1
    page = _ask(server, "GET", f"/r/{rater}")[2].decode()
    data = json.loads(page.split('id="study">')[1].split("</script>")[0])
    assert data["saved"] == {items[0]: {"semantics": 3}}


def test_texts_cannot_leave_the_data_of_the_page(tmp_path, write_replies):
    files = write_replies(1)
    evil = "</script><script>alert(1)</script><!-- {{data}} {{script}} & \u2028"
    for file in map(Path, files):
        row = json.loads(file.read_text().split("\n")[0])
        file.write_text(json.dumps({**row, "reply": evil}))
    key = build(files, tmp_path / "study", StudyOptions(1, 1, checks=0, title="<b>&</b>"), static=True)
    page = (tmp_path / "study/static" / f"{next(iter(key['raters']))}.html").read_text()
    assert "<script>alert" not in page and "<title>&lt;b&gt;&amp;&lt;/b&gt;</title>" in page
    data = json.loads(page.split('id="study">')[1].split("</script>")[0])
    assert [item["reply"] for item in data["items"]] == [evil, evil]


# ---------------------------------------------------------------------------------------------------------- analysis


# K. Krippendorff, "Computing Krippendorff's Alpha-Reliability": four observers, twelve units, missing data.
def _answer_all(folder, key, score, rater_changes=None):
    """Every rater answers by `score(rater's place, conversation, system, question)`, checks as they ask."""
    for place, (rater, items) in enumerate(key["raters"].items()):
        change = (rater_changes or {}).get(place, {})
        lines = []
        for item in items[: change.get("stop")]:
            about = key["items"][item]
            for question in ("semantics", "empathy"):
                given = (
                    score(place, about["conversation"], about["system"], question)
                    if "system" in about
                    else about["check"] % 3 + 1
                    if change.get("fails")
                    else about["check"]
                )
                more = {name: change[name] for name in ("seconds", "played") if name in change}
                lines.append(json.dumps(_line(rater, item, question, given, **more)) + "\n")
        if lines:
            (folder / "answers" / f"{rater}.jsonl").write_text("".join(lines))


def test_scores_preferences_and_intervals(study):
    folder, key = study(count=5)
    table = {  # conversation: zebra's and quokka's score of `semantics` by raters 0 and 1, and by 2 and 3
        f"talk-{i}": rows
        for i, rows in enumerate(
            [((3, 1), (3, 2)), ((2, 2), (2, 2)), ((1, 3), (1, 1)), ((3, 2), (2, 1)), ((2, 1), (3, 3))]
        )
    }

    def score(rater, conversation, system, question):
        return table[conversation][rater // 2][SYSTEMS.index(system)] if question == "semantics" else 2

    _answer_all(folder, key, score)
    result = analyze(folder, resamples=400, seed=3)
    scores = result["scores"]["semantics"]
    assert scores["zebra-7b"]["mean"] == pytest.approx(22 / 10) and scores["quokka"]["mean"] == pytest.approx(18 / 10)
    assert scores["zebra-7b"]["ratings"] == 20 and scores["zebra-7b"]["shares"] == {"1": 0.2, "2": 0.4, "3": 0.4}
    assert result["scores"]["empathy"]["quokka"] | {"shares": 0} == {
        "mean": 2, "interval": [2, 2], "ratings": 20, "shares": 0,
    }  # fmt: skip
    (preference,) = result["preferences"]["semantics"]
    assert preference["systems"] == list(SYSTEMS) and preference["comparisons"] == 20
    assert [preference[name] for name in ("better", "same", "worse")] == [0.5, 0.4, 0.1]
    # The same bootstrap, slowly: whole conversations are drawn.
    draw = np.random.default_rng(3).integers(0, 5, (400, 5))
    names = list(key["conversations"])
    means = [
        np.mean([table[names[i]][half][0] - table[names[i]][half][1] for i in row for half in (0, 1)]) for row in draw
    ]
    (difference,) = result["differences"]["semantics"]
    assert difference["mean"] == pytest.approx(0.4)
    assert difference["interval"] == pytest.approx(list(np.percentile(means, [2.5, 97.5])))
    # Agreement is that of the units (conversation, system).
    units = [[table[name][half][s] for half in (0, 0, 1, 1)] for name in names for s in (0, 1)]
    for level in ("ordinal", "nominal"):
        wanted = alpha(coincidences(units, (1, 2, 3)), level)
        assert result["agreement"]["semantics"][level]["alpha"] == pytest.approx(wanted)
    assert result["agreement"]["empathy"]["ordinal"] == {"alpha": None, "interval": None}
    assert result["kept_raters"] == 4 and result["settings"]["exclusion_as_stated_before"]


def test_between_compares_the_means_of_a_conversation(study):
    folder, key = study(count=6, design="between", checks=0, systems=SYSTEMS)
    assert key["settings"]["ratings"] == 2
    _answer_all(
        folder, key, lambda rater, talk, system, question: 3 if (system == "quokka") != (talk == "talk-0") else 1
    )
    (preference,) = analyze(folder, resamples=50)["preferences"]["empathy"]
    assert preference["comparisons"] == 6
    assert preference["worse"] == pytest.approx(5 / 6) and preference["better"] == pytest.approx(1 / 6)


def test_raters_are_left_out_by_the_stated_rules(study):
    folder, key = study(raters=6)
    changes = {0: {"stop": 3}, 1: {"fails": True}, 2: {"seconds": 0.7}, 3: {"played": 0.2}, 4: {"stop": 0}}
    _answer_all(folder, key, lambda rater, *_: 3 if rater == 5 else 1, changes)
    result = analyze(folder, resamples=50)
    reasons = [row["reasons"] for row in result["raters"]]
    assert [len(each) for each in reasons] == [1, 1, 1, 1, 0, 0]
    for each, words in zip(
        reasons, ("answered 6 of 18", "failed 1 of 1", "took a median of 0.7 s", "played 0%"), strict=False
    ):
        assert words in each[0]
    assert [row["started"] for row in result["raters"]] == [True, True, True, True, False, True]
    assert result["kept_raters"] == 1 and result["scores"]["empathy"]["quokka"]["mean"] == 3
    loose = Exclusion(complete=0, failed_checks=1, median_seconds=0, played=0)
    changed = analyze(folder, loose, resamples=50)
    assert changed["kept_raters"] == 5 and not changed["settings"]["exclusion_as_stated_before"]
    assert "CHANGED after the study" in markdown(changed) and "as stated before the study" in markdown(result)
    with pytest.raises(StudyError, match="none of 6 raters can be counted; 5 started"):
        analyze(folder, Exclusion(median_seconds=99))


def test_the_last_answer_counts_and_strangers_do_not(study):
    folder, key = study()
    _answer_all(folder, key, lambda *_: 2)
    rater, items = next(iter(key["raters"].items()))
    item = next(item for item in items if key["items"][item].get("system") == "quokka")
    stranger = next(item for other in list(key["raters"])[1:] for item in key["raters"][other])
    with open(folder / "answers" / f"{rater}.jsonl", "a") as file:
        for line in (_line(rater, item, score=1), _line(rater, item, score=3), _line(rater, stranger, score=1)):
            file.write(json.dumps(line) + "\n")
        file.write('{"rater": "cut o')
    result = analyze(folder, resamples=50)
    assert result["scores"]["semantics"]["quokka"]["mean"] == pytest.approx((2 * 15 + 3) / 16)
    assert len(result["problems"]) == 2 and "does not belong to this study" in result["problems"][1]


def test_names_cannot_break_the_table(study, tmp_path):
    folder, key = study(count=2, systems=("a|b<i>", "c"), raters=1)
    _answer_all(folder, key, lambda *_: 2)
    page, data = write(analyze(folder, resamples=10), tmp_path / "out")
    row = next(line for line in page.read_text().split("\n") if line.startswith("| a"))
    assert row.startswith("| a&#124;b&lt;i&gt; | 2.00 [2.00, 2.00] | 2.00")
    assert row.count("|") == 5 and json.loads(data.read_text())["kept_raters"] == 1


# ------------------------------------------------------------------------------------------------------- in the report


def _rows(text):
    rows = re.findall(r"<tr.*?</tr>", text, re.DOTALL)
    return [[re.sub(r"<.*?>", "", cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def test_the_report_takes_up_the_study(study, tmp_path, capsys):
    folder, key = study(count=4, raters=3, systems=("zebra_7b", "quo&ka"))
    _answer_all(
        folder, key, lambda rater, talk, system, _: 3 if system == "quo&ka" else 1 + (rater == 1), {2: {"seconds": 1}}
    )
    assert main(["study", "analyze", str(folder), "--resamples", "99", "--min_played", "0.25"]) == 0
    out = tmp_path / "report"
    assert main(["evaluate", "report", str(tmp_path), f"--output={out}"]) == 0  # found right below
    page, markdown_page, tables = ((out / name).read_text() for name in ("report.html", "report.md", "tables.tex"))
    rows = _rows(page)
    assert ["zebra_7b", "1.50 [1.50, 1.50]", "1.50 [1.50, 1.50]", "8"] in rows
    assert ["quo&amp;ka", "3.00 [3.00, 3.00]", "3.00 [3.00, 3.00]", "8"] in rows
    preferred = ["zebra_7b", "quo&amp;ka", *("0% [0%, 0%]",) * 2, "100% [100%, 100%]", "8", "-1.50 [-1.50, -1.50]"]
    assert rows.count(preferred) == 2  # of both questions
    result = json.loads((folder / "analysis.json").read_text())
    for level in result["agreement"].values():
        shown = [
            f"{each['alpha']:.3f} [{each['interval'][0]:.3f}, {each['interval'][1]:.3f}]" for each in level.values()
        ]
        assert any(row[1:] == shown for row in rows)
    (left_out,) = [row for row in rows if row[:1] == ["3"] and len(row) == 6]
    assert left_out[1] == "left out: took a median of 1.0 s per reply (less than 2 s)"
    assert ["settings.exclusion.played", "0.25"] in rows and ["settings.seed", "0"] in rows
    assert any(row[0] == "versions.python" for row in rows) and not any(code in page for code in key["raters"])
    assert page.count("<svg ") == 1 and "semantics" in page and ">Human evaluation: study</h2>" in page
    assert "<b>Missing:</b> Human evaluation" not in page and "<b>Missing:</b> Table 1" in page
    # Whoever left raters out after the study says so, in all three.
    for text in (page, markdown_page, tables):
        assert "Rules, CHANGED after the study:" in text and "2 of 3 raters are counted; 3 started." in text
    assert "| quo&amp;ka | 3.00 [3.00, 3.00] |" in markdown_page.replace("&#91;", "[").replace("&#93;", "]")
    assert r"zebra\_7b & 1.50 {[}1.50, 1.50{]} &" in tables and "left out: took" not in tables
    assert all(question["text"] in page for question in key["questions"])


def test_a_study_that_was_not_analysed_is_named(study, tmp_path):
    folder, _ = study()
    (tmp_path / "report.json").write_text(
        json.dumps({"settings": {"pooling": "mean", "threshold": 0}, "pairs": 0, "splits": {}})
    )
    assert main(["evaluate", "report", str(tmp_path)]) == 0
    assert (
        f"Human evaluation (Sec. 5.2): run empathic study analyze {folder}." in (tmp_path / "report.html").read_text()
    )


# ----------------------------------------------------------------------------------------------------------- command


def test_the_command_builds_and_analyses(tmp_path, write_replies, capsys):
    files, folder = write_replies(5), tmp_path / "study"
    options = ["--conversations", "4", "--raters", "2", "--checks", "1", "--min_seconds", "1", "--static"]
    assert main(["study", "build", *files, "--out", str(folder), *options]) == 0
    printed = capsys.readouterr().out
    assert "4 conversations, 2 systems (zebra-7b, quokka), 2 raters, 2 ratings of each reply" in printed
    key = json.loads((folder / "key.json").read_text())
    assert key["settings"]["exclusion"]["median_seconds"] == 1
    _answer_all(folder, key, lambda rater, talk, system, question: 3 if system == "quokka" else 1)
    shutil.move(folder / "answers", tmp_path / "downloads")
    downloads = [str(path) for path in (tmp_path / "downloads").iterdir()]
    assert main(["study", "analyze", str(folder), "--answers", *downloads, "--resamples", "99"]) == 0
    printed = capsys.readouterr().out
    assert "quokka    3.00 [3.00, 3.00]" in printed and "2 of 2 raters are counted" in printed
    assert (folder / "analysis.md").is_file() and (folder / "analysis.json").is_file()
    assert main(["study", "build", *files, "--out", str(folder)]) == 1
    assert main(["study", "analyze", str(tmp_path)]) == 1
    assert main(["study", "serve", str(tmp_path)]) == 1
    assert "never overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["build", "serve", "analyze"])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["study", command, "--help"])
    assert stop.value.code == 0 and f"example:\n  empathic study {command} " in capsys.readouterr().out
