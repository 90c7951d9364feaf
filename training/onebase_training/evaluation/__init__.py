"""How good a model is: losses, generated answers, metrics, and what serving costs."""
