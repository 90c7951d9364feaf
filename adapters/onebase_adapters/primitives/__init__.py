"""The instruction set that every adapter is lowered to."""
