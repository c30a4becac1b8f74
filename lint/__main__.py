"""Run bandit over `app/`, and pip-audit over what is pinned: `make lint`, behind ruff and mypy.

Where the tools cannot be installed, or the service of vulnerabilities not be reached, a line says so and nothing fails; what
is found does. Arguments go to pip-audit (`--vulnerability-service osv`).
"""

from __future__ import annotations

import subprocess
import sys

from lint import environment
from lint.audit import audit
from venvs import ROOT, Unavailable


def main(arguments: list[str]) -> int:
    """Return the exit code: 1 for findings."""
    try:
        python = environment.python()
    except Unavailable as error:
        print(f"bandit and pip-audit were not run: {error}")
        return 0
    scan = [str(python), "-m", "bandit", "--quiet", "--recursive", "--configfile", "pyproject.toml", "app"]
    unsafe = subprocess.run(scan, cwd=ROOT).returncode != 0
    found = [audit(python, ROOT / name, arguments) for name in ("requirements.txt", "otel-requirements.txt")]
    print("\n".join(dict.fromkeys(line for one in found for line in one.lines)))
    return int(unsafe or any(one.failed for one in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
