"""The sending half: what to push, when, to whom; leases on blocks being read."""
