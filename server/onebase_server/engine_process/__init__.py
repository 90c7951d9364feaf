"""The process that holds the engine: its messages, its worker, and the API's side of it."""
