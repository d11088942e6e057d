"""The tiny preset: a synthetic corpus and parts small enough to train from scratch on a laptop."""
