"""The receiving half: ask, accept, count what landed, fall back to computing."""
