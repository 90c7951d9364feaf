"""From stored tensors to primitives: one file a method."""
