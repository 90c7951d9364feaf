"""The offline trainer: from a data file to an adapter folder that registers as it is."""
