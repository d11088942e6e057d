"""Replies and thoughts: the markers of several families, thoughts that are cut, and markers that are special tokens."""

import pytest
from transformers import AutoTokenizer

from empathic.thoughts import Written, WrittenDecoder, ends_in_thought, is_thought_so_far, read_written

GOOD = "I am so sorry."


@pytest.mark.parametrize(
    "text",
    [
        f"<think>\nShe is sad.\n</think>\n\n{GOOD}",
        f"She is sad.\n</think>\n\n{GOOD}",  # the chat template wrote the opening
        f"<think>She is sad.</think><answer>{GOOD}</answer>",
        f"<Thinking>She is sad.</Thinking> {GOOD}",
        f"<thought>She is sad.</thought> {GOOD}",
        f"<seed:think>She is sad.</seed:think>{GOOD}",
        f"[THINK]She is sad.[/THINK]{GOOD}",
        f"◁think▷She is sad.◁/think▷{GOOD}",
        f"<|channel>thought\nShe is sad.<channel|>{GOOD}",
        f"<|START_THINKING|>She is sad.<|END_THINKING|><|START_RESPONSE|>{GOOD}<|END_RESPONSE|>",
        "<|channel|>analysis<|message|>She is sad.<|end|><|start|>assistant<|channel|>final<|message|>"
        f"{GOOD}<|return|>",
        f"analysisShe is sad.assistantfinal{GOOD}",  # the same without its special tokens
    ],
)
def test_a_thought_is_no_part_of_the_reply(text):
    assert read_written(text) == Written(GOOD, "She is sad.", False)


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nShe is sad",
        "[THINK]She is sad",
        "<|channel>thought\nShe is sad",
        "<|channel|>analysis<|message|>She is sad",
        "analysisShe is sad",
    ],
)
def test_a_thought_that_is_cut_is_no_reply_and_the_note_says_so(text):
    written = read_written(text)
    assert written == Written("", "She is sad", True) and "cut off" in written.note()


def test_several_thoughts_and_mentions_of_markers_are_told_apart():
    assert read_written("<think>a</think>One. <think>b</think>Two.").reply == "One. Two."
    assert read_written("<think>a <think> b</think>c</think>d").reply == "d"
    assert read_written("I think so. <b>Yes</b> (final) [1]") == Written("I think so. <b>Yes</b> (final) [1]")
    assert read_written("analysis is hard") == Written("analysis is hard")
    assert read_written("<think>\n\n</think>\n\nfine") == Written("fine") and read_written("") == Written("")
    assert "only a thought" in read_written("<think>a</think>").note() and read_written("fine").note() is None


def test_a_prompt_that_begins_the_thought_is_continued():
    assert ends_in_thought("<|im_start|>assistant\n<think>\n")
    assert not ends_in_thought("<|im_start|>assistant\n<think>\n\n</think>\n\n") and not ends_in_thought(
        "user: <think> a"
    )
    assert read_written("She is sad", in_thought=True) == Written("", "She is sad", True)
    assert read_written(f"She is sad</think>{GOOD}", in_thought=True).reply == GOOD


def test_while_a_text_is_written_a_thought_is_held_back():
    text = f" <think>She is sad.</think>\n{GOOD}"
    held = [is_thought_so_far(text[:end]) for end in range(1, len(text) + 1)]
    assert held.index(False) == text.index("I am") and not any(held[text.index("I am") :])
    assert not is_thought_so_far("<b") and is_thought_so_far("<t") and not is_thought_so_far("I")


@pytest.mark.parametrize("special", [False, True])
def test_markers_that_are_special_tokens_are_seen(parts, special):
    """Qwen's markers are plain added tokens, Mistral's and gpt-oss's are special ones, which decoding drops."""
    tokenizer = AutoTokenizer.from_pretrained(parts["text"])
    tokenizer.add_tokens(["[THINK]", "[/THINK]"], special_tokens=special)
    ids = tokenizer(f"[THINK]She is sad.[/THINK]{GOOD}<|im_end|>")["input_ids"] + [tokenizer.eos_token_id] * 2
    assert WrittenDecoder(tokenizer)(ids) == Written(GOOD, "She is sad.", False)
    plain = tokenizer(f" {GOOD}<|im_end|>")["input_ids"]
    assert WrittenDecoder(tokenizer).text(plain) == tokenizer.decode(plain, skip_special_tokens=True)
