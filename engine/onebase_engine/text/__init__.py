"""Text to tokens and back, without torch: what the API process needs of the base model."""
