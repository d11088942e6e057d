"""The page of the Space."""

from pathlib import Path

from space import build

demo = build(
    Path(__file__).with_name("bertscore.py"),
    predictions="the old cat\nwe met in Rome",
    references="the old dog\nwe met in Oslo || it was in Rome",
)

if __name__ == "__main__":
    demo.launch()
