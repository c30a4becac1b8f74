"""`python -m app`: see `app/cli.py`. What is wrong with the Python that was called is said here, in words that old ones can read."""

import sys

NEEDED = (3, 12)


def refuse(problem: str) -> None:
    """Say on standard error what is needed, and end."""
    sys.stderr.write(problem + "\n")
    sys.exit(2)


if __name__ == "__main__":
    if sys.version_info < NEEDED:
        refuse("Python {}.{} is needed, this is {}.{}".format(*NEEDED, *sys.version_info[:2]))
    try:
        from app.cli import main

        sys.exit(main())
    except KeyboardInterrupt:  # before there was anything that could have been interrupted
        sys.exit(130)
    except ModuleNotFoundError as error:
        missing = (error.name or "app").partition(".")[0]
        if missing == "app":
            raise
        remedy = "python -m pip install -r requirements.txt, or use .venv/bin/python, which `make run` makes"
        refuse("module " + missing + " is missing: " + remedy)
