"""Examples to token ids, and rows of them."""
