"""`baton keys PATH`: the file by which a cluster encrypts and knows who belongs to it. Its content is never printed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from transport.keys import make_keys


def run(options: argparse.Namespace) -> int:
    """Says where the file lies, on standard error."""
    make_keys(Path(options.path))
    print(
        f"made {options.path}: copy it to every host of the cluster, by a safe way and with mode 0600, and start "
        f"everything with --keys {options.path}",
        file=sys.stderr,
    )
    return 0
