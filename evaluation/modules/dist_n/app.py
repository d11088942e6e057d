"""The page of the Space."""

from pathlib import Path

from space import build

demo = build(
    Path(__file__).with_name("dist_n.py"),
    predictions="no, no, no!\ni see",
)

if __name__ == "__main__":
    demo.launch()
