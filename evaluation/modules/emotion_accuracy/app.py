"""The page of the Space."""

from pathlib import Path

from space import build

demo = build(
    Path(__file__).with_name("emotion_accuracy.py"),
    predictions="happy\nsad\nsad",
    references="happy\nhappy\nsad",
)

if __name__ == "__main__":
    demo.launch()
