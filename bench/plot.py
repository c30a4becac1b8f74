"""The picture in the README: requests per second of each service, drawn from what `bench.serving` left as JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import escape

TITLES = {
    "linear": "linear pipeline, 30 features",
    "mixed": "words and numbers of a DataFrame, boosting",
    "forest": "forest of 100 trees, depth 12",
    "boosting": "histogram boosting, 200 iterations",
}
LABELS = {
    "serve": "Diskless",
    "asgi": "Diskless, any ASGI server",
    "floor": "orjson + onnxruntime by hand",
    "mosec": "mosec, batching",
    "inline": "orjson + scikit-learn by hand",
    "mlserver": "MLServer, batching",
    "naive": "FastAPI + joblib",
}
OURS = ("serve", "asgi")
WIDTH, NAMES, FIGURES = 450, 205, 65  # of a panel, and of the columns of its names and its figures
BAR, GAP, HEAD = 15, 5, 34
LEAST = 10.0  # requests/s, where the bars begin: their length is logarithmic


def write(source: Path, target: Path) -> None:
    """Draw `target` from the figures in `source`: medians of 64 connections with single rows."""
    runs = json.loads(source.read_text())["runs"]
    rates: dict[str, dict[str, float]] = {}
    for kind in TITLES:
        for name in LABELS:
            taken = [
                run["rate"]
                for run in runs
                if (run["kind"], run["name"], run["connections"]) == (kind, name, 64)
                and not run["large"]
                and not run["request_ids"]
                and not run["errors"]
            ]
            if taken:
                rates.setdefault(kind, {})[name] = statistics.median(taken)
    target.write_text(draw(rates))


def draw(rates: Mapping[str, Mapping[str, float]]) -> str:
    """Return the picture of requests per second by kind and service: two panels beside each other."""
    most = max((rate for panel in rates.values() for rate in panel.values()), default=LEAST * 10)
    rows = max((len(panel) for panel in rates.values()), default=0)
    height = HEAD + rows * (BAR + GAP) + 14
    panels = [
        _panel(TITLES[kind], panel, most, (number % 2) * WIDTH, 24 + number // 2 * height)
        for number, (kind, panel) in enumerate(rates.items())
    ]
    whole = 24 + math.ceil(len(panels) / 2) * height
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {whole}" font-family="sans-serif" font-size="12" '
            'role="img" aria-label="Requests per second on one core, by service">',
            # read on a light page and on a dark one
            "<style>text{fill:#57606a}.title{font-weight:600}.ours{fill:#1a7f37}.theirs{fill:#9aa4af}"
            "@media(prefers-color-scheme:dark){text{fill:#c9d1d9}.ours{fill:#3fb950}.theirs{fill:#6e7681}}</style>",
            '<text x="8" y="16">requests/s on one core: 64 connections, single rows (logarithmic)</text>',
            *panels,
            "</svg>\n",
        ]
    )


def _panel(title: str, rates: Mapping[str, float], most: float, left: int, top: int) -> str:
    lines = [f'<text class="title" x="{left + 8}" y="{top + 22}">{escape(title)}</text>']
    full = WIDTH - NAMES - FIGURES
    for number, (name, rate) in enumerate(sorted(rates.items(), key=lambda item: -item[1])):
        y = top + HEAD + number * (BAR + GAP)
        length = max(1.0, full * math.log(max(rate, LEAST) / LEAST) / math.log(most / LEAST))
        tone = "ours" if name in OURS else "theirs"
        lines += [
            f'<text x="{left + NAMES - 8}" y="{y + 12}" text-anchor="end">{escape(LABELS[name])}</text>',
            f'<rect class="{tone}" x="{left + NAMES}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2"/>',
            f'<text x="{left + NAMES + length + 6:.1f}" y="{y + 12}">{rate:,.0f}</text>',
        ]
    return "\n".join(lines)
