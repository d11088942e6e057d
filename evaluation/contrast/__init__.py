"""Contrast evaluation: the same words with clips of different emotions, and whether the reply follows the clip."""
