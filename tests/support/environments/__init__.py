"""Environments as users write them, good and bad."""
