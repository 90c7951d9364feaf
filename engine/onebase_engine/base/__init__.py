"""The frozen base model: where it comes from, how it is quantised, which linear sites adapters may touch."""
