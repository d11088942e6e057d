"""The paper's human evaluation (Sec. 5.2 and 9): a blind study of saved replies, its page, and its analysis."""
