"""Questions about long conversations, answered from the text, from retrieved turns, and from the memory."""

# What a prompt has of the conversation, see `arms`.
ARMS = ("full", "last", "retrieval", "memory", "memory_retrieval")
