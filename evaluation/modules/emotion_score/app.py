"""The page of the Space."""

from pathlib import Path

from space import build

demo = build(
    Path(__file__).with_name("emotion_score.py"),
    predictions="I am so sorry for you.\nThat is wonderful!",
    references="Oh no, that is sad.\nHow great! || Congratulations!",
)

if __name__ == "__main__":
    demo.launch()
