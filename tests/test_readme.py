"""The README's table of settings is the code's."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from app.settings import markdown

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


@pytest.mark.skipif(not README.exists(), reason="there is no README.md")
def test_the_readme_has_every_setting_as_the_code_has_it():
    between = re.search(r"<!-- settings -->\n(.*?)<!-- /settings -->", README.read_text(), re.S)

    assert between, "README.md has no <!-- settings --> ... <!-- /settings -->"
    assert between[1].strip() == markdown(), "bring it up to date with: python -m app.settings"


def test_the_command_prints_the_table():
    run = subprocess.run([sys.executable, "-m", "app.settings"], cwd=ROOT, capture_output=True, text=True, check=True)

    assert run.stdout == f"{markdown()}\n"
