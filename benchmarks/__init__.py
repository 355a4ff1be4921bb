"""`baton bench ...`: each figure of the README in one command, with its baseline beside it."""
