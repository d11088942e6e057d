"""The human evaluation of the paper (Sec. 5.2 and 9): a blind study of saved replies, its page, and its analysis."""
