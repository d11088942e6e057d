"""The benchmarks' files are read by their published formats, and what cannot be used is named."""

import json

import pytest

from empathic.benchmarks.memory_qa.sources import load_benchmark


def locomo():
    return [
        {
            "sample_id": "conv-1",
            "conversation": {
                "speaker_a": "Clara",
                "speaker_b": "Bo",
                "session_2_date_time": "2:00 pm on 9 May, 2023",
                "session_2": [{"speaker": "Bo", "dia_id": "D2:1", "text": "i am fine"}],
                "session_1_date_time": "1:00 pm on 8 May, 2023",
                "session_1": [
                    {"speaker": "Clara", "dia_id": "D1:1", "text": "hello there"},
                    {"speaker": "Bo", "dia_id": "D1:2", "text": "look", "blip_caption": "a photo of an old dog"},
                    {"speaker": "Bo", "dia_id": "D1:3", "text": ""},
                ],
                "session_10_date_time": "3:00 pm on 1 June, 2023",
                "session_10": [{"speaker": "Clara", "dia_id": "D10:1", "text": "thanks"}],
            },
            "qa": [
                {"question": "Who has a dog?", "answer": "Bo", "evidence": ["D1:02; D2:1"], "category": 1},
                {"question": "When was that?", "answer": 2023, "evidence": ["D1:2"], "category": 2},
                {"question": "Why?", "answer": "Unknown; it is old", "evidence": [], "category": 3},
                {"question": "Who is fine?", "answer": "Bo", "evidence": ["D9:9"], "category": 4},
                {"question": "Is Clara fine?", "adversarial_answer": "yes", "evidence": ["D2:1"], "category": 5},
                {"question": "What?", "answer": "", "evidence": [], "category": 4},
                {"question": "What?", "answer": "a", "evidence": [], "category": 9},
            ],
        }
    ]


def longmemeval():
    turns = [{"role": "user", "content": "i have a dog", "has_answer": True}, {"role": "assistant", "content": "fine"}]
    return [
        {
            "question_id": name,
            "question_type": "multi-session",
            "question": "what do i have?",
            "answer": "a dog",
            "question_date": "2023/06/01 (Thu) 10:00",
            "haystack_session_ids": ["late", "early"],
            "haystack_dates": ["2023/05/30 (Tue) 12:00", "2023/05/20 (Sat) 02:21"],
            "haystack_sessions": [[{"role": "user", "content": "thanks"}, {"role": "tool", "content": "x"}], turns],
        }
        for name in ("one", "two_abs")
    ]


def es_memeval():
    return [
        {
            "id": "s1",
            "dialog_history": [
                {
                    "id": "d1",
                    "timestamp": "2024-08-15",
                    "dialogue": [
                        {"idx": 0, "role": "seeker", "content": "my dog is old"},
                        {"idx": 1, "role": "supporter", "content": "how are you"},
                    ],
                }
            ],
            "questions": [
                {
                    "id": "g",
                    "questions": [
                        {"idx": 0, "capability": "IE", "question": "who is old?", "answer": "the dog",
                         "evidence": ["d1:0", "d7:1"]},
                        {"idx": 1, "capability": "Abs", "question": "", "answer": "the dog", "evidence": []},
                    ],
                }
            ],
        }
    ]  # fmt: skip


def write(tmp_path, content, name="data.json"):
    path = tmp_path / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_locomo(tmp_path):
    found = load_benchmark(write(tmp_path, locomo()))
    [talk] = found.conversations
    assert found.name == "locomo" and talk.id == "conv-1"
    assert [(turn.id, turn.role, turn.name) for turn in talk.said] == [
        ("D1:1", "user", "Clara"), ("D1:2", "assistant", "Bo"), ("D2:1", "assistant", "Bo"), ("D10:1", "user", "Clara")
    ]  # fmt: skip
    assert talk.said[1].text == "look [shares a photo of an old dog]" and talk.said[3].date == "3:00 pm on 1 June, 2023"
    assert [(q.category, q.answer, q.evidence) for q in talk.questions] == [
        ("multi-hop", "Bo", ("D1:2", "D2:1")),
        ("temporal", "2023", ("D1:2",)),
        ("open domain", "Unknown; it is old", ()),
        ("single-hop", "Bo", ()),
        ("adversarial", "yes", ("D2:1",)),
    ]
    named = dict(found.left_out)
    assert set(named) == {"conv-1 D1:3", "conv-1 question 3", "conv-1 question 5", "conv-1 question 6"}
    assert "D9:9" in named["conv-1 question 3"]


def test_the_corrections_of_locomos_answer_keys(tmp_path):
    entry = {"question_id": "locomo_0_qa3", "correct_answer": "Nobody", "correct_evidence": ["D1:1"], "reasoning": "x"}
    corrections = write(tmp_path, [entry], "errors.json")
    [talk] = load_benchmark(write(tmp_path, locomo()), corrections).conversations
    assert (talk.questions[3].answer, talk.questions[3].evidence) == ("Nobody", ("D1:1",))
    assert talk.questions[0].answer == "Bo"
    with pytest.raises(ValueError, match="corrections are those of LoCoMo"):
        load_benchmark(write(tmp_path, es_memeval()), corrections)
    with pytest.raises(ValueError, match="is no list of corrections"):
        load_benchmark(write(tmp_path, locomo()), write(tmp_path, [{"id": 1}], "other.json"))


def test_longmemeval(tmp_path):
    found = load_benchmark(write(tmp_path, longmemeval()))
    one, two = found.conversations
    assert found.name == "longmemeval"
    assert [turn.id for turn in one.said] == ["early:0", "early:1", "late:0"]  # in the order of time
    assert one.questions[0].evidence == ("early:0",) and one.questions[0].date.startswith("2023/06/01")
    assert [talk.questions[0].category for talk in (one, two)] == ["multi-session", "abstention"]
    assert len(found.left_out) == 2


def test_es_memeval(tmp_path):
    found = load_benchmark(write(tmp_path, es_memeval()))
    [talk] = found.conversations
    assert found.name == "es-memeval"
    assert [(turn.id, turn.role, turn.date) for turn in talk.said] == [
        ("d1:0", "user", "2024-08-15"), ("d1:1", "assistant", "2024-08-15")
    ]  # fmt: skip
    [question] = talk.questions
    assert (question.category, question.evidence) == ("IE", ("d1:0",))
    assert found.left_out == [("s1:g:1", "no question or no answer")]


@pytest.mark.parametrize("content", [[], {}, [1], [{"text": "hello"}]])
def test_another_file_is_an_error(tmp_path, content):
    with pytest.raises(ValueError, match="is none of the benchmarks"):
        load_benchmark(write(tmp_path, content))


def test_a_file_without_a_question_or_that_is_no_json_is_an_error(tmp_path):
    content = locomo()
    content[0]["qa"] = []
    with pytest.raises(ValueError, match="has no question that can be used"):
        load_benchmark(write(tmp_path, content))
    (tmp_path / "broken.json").write_text("[{", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        load_benchmark(tmp_path / "broken.json")
