"""Deciding which tokens run in the next step. No torch."""
