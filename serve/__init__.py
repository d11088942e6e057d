"""The chatbot as a service that speaks OpenAI's chat completions protocol."""
