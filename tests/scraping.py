"""Asking a service for its metrics as Prometheus does, and reading the answer with the parsers of its own client library."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.service import Service

TEXT = "text/plain;version=0.0.4;q=0.3,*/*;q=0.1"
OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"  # as Prometheus asks
Labels = frozenset[tuple[str, str]]


class Scrape:
    """The samples of one answer, by name and labels. No sample may be there twice."""

    def __init__(self, text: str, families: Iterable[Any]) -> None:
        self.text = text
        self.families = list(families)
        self.samples: dict[tuple[str, Labels], float] = {}
        for family in self.families:
            for sample in family.samples:
                key = sample.name, frozenset(sample.labels.items())
                assert key not in self.samples, f"{key} is there twice"
                self.samples[key] = sample.value

    def matching(self, name: str, **labels: str) -> Iterator[tuple[dict[str, str], float]]:
        """Yield labels and value of the samples of a name that have these labels."""
        for (found, pairs), value in self.samples.items():
            if found == name and labels.items() <= dict(pairs).items():
                yield dict(pairs), value

    def sum(self, name: str, **labels: str) -> float:
        """Add up the samples of a name that have these labels; there must be one."""
        values = [value for _, value in self.matching(name, **labels)]
        assert values, f"there is no {name} with {labels}"
        return sum(values)

    def by(self, label: str, name: str, **labels: str) -> dict[str, float]:
        """Add up the samples of a name that have these labels by another label; what is 0 is left out."""
        found: dict[str, float] = {}
        for pairs, value in self.matching(name, **labels):
            found[pairs[label]] = found.get(pairs[label], 0) + value
        return {one: value for one, value in found.items() if value}

    def histogram(self, name: str, **labels: str) -> dict[float, float]:
        """Return the buckets of one histogram: how many values up to each bound."""
        return {float(pairs["le"]): value for pairs, value in self.matching(f"{name}_bucket", **labels)}


def scrape(service: Service, accept: str = TEXT) -> Scrape:
    answer = service.client.get("/metrics", headers={"Accept": accept})
    assert answer.status_code == 200, answer.text
    is_open = answer.headers["content-type"].startswith("application/openmetrics-text")
    assert is_open == accept.startswith("application/openmetrics-text")
    return Scrape(answer.text, (parse_openmetrics if is_open else parse_text)(answer.text))


def scrape_until(service: Service, condition: Callable[[Scrape], Any], seconds: float = 30) -> Scrape:
    """Ask until the answer fulfils a condition: another worker may be a moment behind the one that has answered."""
    end = time.monotonic() + seconds
    while not condition(found := scrape(service)):
        assert time.monotonic() < end, f"not so in {seconds} s:\n{found.text}"
        time.sleep(0.02)
    return found


def changes(before: Scrape, after: Scrape) -> Mapping[tuple[str, Labels], float]:
    """Return by how much each sample has changed that has; one that was not there was 0."""
    found = {key: value - before.samples.get(key, 0) for key, value in after.samples.items()}
    return {key: change for key, change in found.items() if change}
