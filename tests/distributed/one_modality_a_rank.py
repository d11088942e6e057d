"""Gives one process sound alone and the other one text or pictures alone; run by `launch_on_cpu.py` in each of them."""

from torch.utils.data import SequentialSampler

from empathic.trainers.preference_collator import PairRows
from empathic.trainers.samples import SampleStream

EACH = 2  # samples of a process


def only(messages: list[dict], kinds: tuple[str, ...]) -> list[dict]:
    """The messages, with those items in the last one alone."""
    *earlier, last = messages
    return [*earlier, {**last, "content": [item for item in last["content"] if item["type"] in kinds]}]


def prepare(trainer) -> None:
    """Puts `EACH` samples with sound alone before `EACH` with text, or in stage emotion pictures, alone."""
    stage, data = trainer.stage_record.stage, trainer.train_dataset
    key = "prompt" if stage == "epo" else "messages"
    rows = data.rows if stage == "epo" else SampleStream(data.sources, 100, data.seed)
    other = ("video",) if stage == "emotion" else ("text",)
    heard, seen = [], []
    for row in (rows[number] for number in range(len(rows))):
        content = row[key][-1]["content"]
        kinds = set() if isinstance(content, str) else {item["type"] for item in content}
        if "audio" in kinds and len(heard) < EACH:
            heard.append(row)
        elif kinds.issuperset(other) and len(seen) < EACH:
            seen.append(row)
    assert len(heard) == len(seen) == EACH
    rows = [{**row, key: only(row[key], ("audio",))} for row in heard]
    rows += [{**row, key: only(row[key], other)} for row in seen]
    trainer.train_dataset = PairRows(rows, "train", seed=0) if stage == "epo" else rows
    trainer._get_train_sampler = lambda *args: SequentialSampler(rows)
    if stage == "epo":  # its callback tells the old rows the epoch, which is 0
        assert trainer.train_dataset[0]["sampling_seed"][1] == 0
