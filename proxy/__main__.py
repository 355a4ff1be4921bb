"""`python -m proxy`."""

from proxy.server import main

if __name__ == "__main__":
    raise SystemExit(main())
