"""Ready-made data sets, and a demonstration that trains and serves with them."""
