"""What `make lint` asks beside ruff and mypy: whether the code is unsafe in a known way, and what it stands on vulnerable."""
