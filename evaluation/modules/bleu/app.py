"""The page of the Space."""

from pathlib import Path

from space import build

demo = build(
    Path(__file__).with_name("bleu.py"),
    predictions="the old cat of clara sleeps",
    references="the old dog of clara sleeps || the cat sleeps",
)

if __name__ == "__main__":
    demo.launch()
