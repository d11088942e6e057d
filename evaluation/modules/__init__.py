"""
The metrics as modules of the library `evaluate`: one folder each, which is all that its Space holds.

    evaluate.load("evaluation/modules/dist_n").compute(predictions=["no, no, no!", "i see"])

`<name>/<name>.py` is what `evaluate` loads. What computes lies beside it and needs no `evaluate`, whose import takes
seconds: `evaluation.metrics` takes it from there. `checked_texts.py` is one file, to which each folder has a link.
"""
