"""The HTTP side: OpenAI's endpoints and the administration of adapters, over an engine in reach."""
