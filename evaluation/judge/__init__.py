"""A rubric judge of saved replies, behind an OpenAI-compatible endpoint, that hears and sees the clip."""
