"""Measure, print the figures, and write them into `bench/RESULTS.md`: `make bench`, or `python -m bench loads` for a part."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable

from bench import contenders, environments, loads, results, serving, swap
from venvs import Unavailable

Part = Callable[[argparse.Namespace], str]
PARTS: dict[str, Part] = {  # each writes the section of its name
    "loads": lambda _: loads.report(),
    "serving": lambda options: serving.report(quick=options.quick, only=options.only),
    "swap": lambda options: swap.report(quick=options.quick),
}


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=f"of {', '.join(PARTS)}; all")
    parser.add_argument("--quick", action="store_true", help="serving, swap: short, to see that it works")
    parser.add_argument(
        "--only",
        action="append",
        choices=contenders.NAMES,
        default=[],
        metavar="NAME",
        help=f"serving: this service, and others that are named so too, of {', '.join(contenders.NAMES)}",
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is ended
    partial = options.quick or bool(options.only)
    words = [*(["--quick"] if options.quick else []), *(word for name in options.only for word in ("--only", name))]
    for name in options.parts or list(PARTS):
        described = results.described(shlex.join(["python", "-m", "bench", name, *words]))
        try:
            measured = PARTS[name](options)
        except Unavailable as error:
            print(f"bench: {name}: {error}", file=sys.stderr)
            return 1
        body = f"{described}\n\n{measured}"
        # what is not the whole of it does not take the place of what is
        results.write_section(name.capitalize(), body, environments.FOLDER / "RESULTS.md" if partial else results.PATH)
        print(body, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
