"""Nouns, errors, clock and wire records that every other folder shares. Imports only msgspec."""
