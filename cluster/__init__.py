"""Makes a topology real: local processes, their start, supervision and end."""
