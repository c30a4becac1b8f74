"""Measure, print the figures, and write them into `bench/RESULTS.md`: `make bench`, or `python -m bench loads` for a part."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable

from bench import loads, results

PARTS: dict[str, Callable[[], str]] = {"loads": loads.report}  # each writes the section of its name


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=f"of {', '.join(PARTS)}; all")
    chosen = parser.parse_args().parts or list(PARTS)
    for name in chosen:
        body = f"{results.described(shlex.join(['python', '-m', 'bench', name]))}\n\n{PARTS[name]()}"
        results.write_section(name.capitalize(), body)
        print(body, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
