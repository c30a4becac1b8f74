"""`python -m app`: see `app/cli.py`."""

import sys

if __name__ == "__main__":
    try:
        from app.cli import main

        sys.exit(main())
    except KeyboardInterrupt:  # before there was anything that could have been interrupted
        sys.exit(130)
