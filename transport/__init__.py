"""Moves blocks (data plane) and messages (control plane) between processes."""
