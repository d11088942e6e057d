"""
The page of a metric's Space: a box for the predictions and one for the references, a text a line.

A file of its own, to which each metric's folder has a link; `app.py` there calls `build`. `evaluate` has such a page
too, but for a gradio that is no longer there.
"""

import re
from pathlib import Path

import evaluate
import gradio

BETWEEN_REFERENCES = "||"


def build(script: Path, **texts: str) -> gradio.Interface:
    """
    The page.

    Args:
        script: the metric's file, with its README beside it.
        texts: what stands in the boxes at first, by the name of the input.
    """
    metric = evaluate.load(str(script))
    names = list(metric.features)
    several = "references" in names and metric.several_references

    def compute(*boxes: str) -> dict:
        inputs = {name: box.splitlines() for name, box in zip(names, boxes, strict=True)}
        if several:
            rows = inputs["references"]
            inputs["references"] = [[text.strip() for text in row.split(BETWEEN_REFERENCES)] for row in rows]
        try:
            return metric.compute(**inputs)
        except (ValueError, RuntimeError) as error:  # a row that is no text, or a model that is not to be had
            raise gradio.Error(str(error)) from error

    def label(name: str) -> str:
        hint = f"; several of one row: {BETWEEN_REFERENCES} between them" if several and name == "references" else ""
        return f"{name}, one a line{hint}"

    readme = script.with_name("README.md").read_text(encoding="utf-8")
    return gradio.Interface(
        fn=compute,
        inputs=[gradio.Textbox(texts.get(name), lines=4, label=label(name)) for name in names],
        outputs=gradio.JSON(label="result"),
        title=script.stem,
        description=metric.description,
        article=re.sub(r"\A---\n.*?\n---\n", "", readme, flags=re.DOTALL),
        flagging_mode="never",
    )
