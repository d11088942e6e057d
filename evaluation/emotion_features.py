"""The emotion of a text as a vector; it lives beside the metric that is made of it, `modules/emotion_score`."""

from .modules.emotion_score.emotion_features import GO_EMOTIONS, POOLINGS, EmotionFeatures

__all__ = ["GO_EMOTIONS", "POOLINGS", "EmotionFeatures"]
