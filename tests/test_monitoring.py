"""What deploy/ has for Prometheus and Grafana, held against what a running service tells.

Each metric, each label and each value that an alert or a panel asks for must be there: a typing error there is an alert that never comes.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.metrics import TABLE
from app.model_storage import ModelStorageManager
from app.storage.local import LocalStorage
from tests import toys
from tests.promql import Matcher, Selector, grouped_by, selectors
from tests.repository import ROWS, linear
from tests.scraping import OPENMETRICS, TEXT, Scrape, scrape
from tests.service import Service, running
from tests.trusted import TRUST

DEPLOY = Path(__file__).parent.parent / "deploy"
ALERTS = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((DEPLOY / "grafana.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
OF_THE_SCRAPER = {"instance", "job"}  # labels that Prometheus adds
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="there is no promtool (Debian has it in `prometheus`)")


@pytest.fixture(scope="module", params=[1, 2], ids=["one worker", "two workers"])
def service(request, tmp_path_factory) -> Iterator[Service]:
    """A service that has answered, refused and failed."""
    folder = tmp_path_factory.mktemp("bucket")
    manager = ModelStorageManager(LocalStorage(folder), trust=TRUST)
    manager.save("linear", linear(1), examples=ROWS[:5])
    manager.save("fails", toys.Fails())
    (folder / "models" / "broken.joblib").write_bytes(b"not a model")
    environment = {"ML_CLOUD_ONLY": "false", "ML_LOCAL_DIR": str(folder), "ML_WORKERS": str(request.param)}
    with running(environment) as running_service:
        running_service.wait_live().wait_for(lambda status: len(status["models"]) == 3, "through with all three")
        running_service.wait_for(lambda status: all(row["state"] != "LOADING" for row in status["models"]), "through")
        running_service.predict(model="linear", instances=[[1, 2, 3]] * 3)
        running_service.predict(model="linear", instances=[["x", 2, 3]])
        running_service.predict(model="fails", instances=[[1, 2, 3]])
        running_service.predict(model="nobody", instances=[[1, 2, 3]])
        running_service.client.get("/nowhere")
        running_service.client.post("/models/refresh")
        yield running_service


@pytest.fixture(scope="module")
def told(service) -> Scrape:
    return scrape(service)


def panel_expressions() -> Iterator[tuple[str, str]]:
    for panel in PANELS:
        yield from ((panel["title"], target["expr"]) for target in panel["targets"])
    for annotation in DASHBOARD["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]


def check(expression: str, told: Scrape) -> None:
    known = OF_THE_SCRAPER.copy()
    found = list(selectors(expression))
    assert found, "it asks for nothing"
    for selector in found:
        samples = [labels for labels, _ in told.matching(selector.name)]
        assert samples, f"there is no metric {selector.name}"
        known |= {label for labels in samples for label in labels}
        for matcher in selector.matchers:
            _check_matcher(selector, matcher, samples)
    assert grouped_by(expression) <= known, f"{grouped_by(expression) - known} are labels of none of its metrics"


def _check_matcher(selector: Selector, matcher: Matcher, samples: list[dict[str, str]]) -> None:
    if matcher.label in OF_THE_SCRAPER:
        return
    values = {labels[matcher.label] for labels in samples if matcher.label in labels}
    assert values, f"{selector.name} has no label {matcher.label}"
    if matcher.value.startswith("$"):
        return
    wanted = matcher.value.split("|") if "~" in matcher.operator else [re.escape(matcher.value)]
    for pattern in wanted:
        assert any(re.fullmatch(pattern, value) for value in values), f"{matcher} is true of none of {values}"


def test_the_reader_of_expressions_reads_them():
    expression = (
        'sum by (a, le) (rate(one_bucket{b="x}, y", c=~"5..|z"}[5m])) / on (d) group_left () two '
        "and on (e) time() - three_seconds{} > bool 4e3 or histogram_quantile(0.9, four[1h:5m] offset 3m)"
    )

    assert list(selectors(expression)) == [
        Selector("one_bucket", (Matcher("b", "=", "x}, y"), Matcher("c", "=~", "5..|z"))),
        Selector("two", ()),
        Selector("three_seconds", ()),
        Selector("four", ()),
    ]
    assert grouped_by(expression) == {"a", "le", "d", "e"}


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("diskless_redy == 0", "no metric"),
        ('diskless_model_state{stat="READY"}', "no label"),
        ('diskless_model_state{state="READ"}', "true of none"),
        ('diskless_requests_total{code=~"ok|overload"}', "true of none"),
        ("sum by (modle) (diskless_rows_total)", "labels of none"),
    ],
)
def test_a_typing_error_is_found(told, expression, complaint):
    with pytest.raises(AssertionError, match=complaint):
        check(expression, told)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_what_is_told_and_says_what_to_do(told, rule):
    check(rule["expr"], told)

    assert {*rule} <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert all(rule["annotations"][part].strip() for part in ("summary", "description"))
    named = {label for text in rule["annotations"].values() for label in re.findall(r"\$labels\.(\w+)", text)}
    aggregated = re.match(r"[\s(]*(?:sum|max|min) by", rule["expr"]) or "histogram_quantile" in rule["expr"]
    kept = grouped_by(rule["expr"]) if aggregated else None
    assert kept is None or named <= kept, f"{named - kept} are not there when it comes"


def test_alerts_have_names_of_their_own():
    names = [rule["alert"] for rule in RULES]

    assert len(names) == len({*names})
    assert all(re.fullmatch(r"Diskless[A-Z]\w+", name) for name in names)


@pytest.mark.parametrize(("title", "expression"), list(panel_expressions()))
def test_a_panel_asks_for_what_is_told(told, title, expression):
    check(expression.replace("$__rate_interval", "5m"), told)


def test_every_metric_but_few_is_on_the_dashboard():
    shown = {selector.name for _, expression in panel_expressions() for selector in selectors(expression)}
    names = {re.sub(r"_(bucket|sum|count)\Z", "", name) for name in shown}

    assert {metric.name for metric in TABLE} <= names


def test_the_dashboard_is_one_that_grafana_takes():
    identities = [panel["id"] for panel in DASHBOARD["panels"]]
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    used = {*re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))} - {"__rate_interval", "__all"}

    assert len(identities) == len({*identities})
    assert used == {*variables} == {"datasource", "instance", "model"}
    for panel in PANELS:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert all(target["refId"] for target in panel["targets"])
    for one, other in combinations([panel["gridPos"] for panel in DASHBOARD["panels"]], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, f"{one} and {other} overlap"
        assert one["x"] + one["w"] <= 24


def test_variables_choose_from_what_is_told(told):
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] != "query":
            continue
        name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()
        samples = [labels for labels, _ in told.matching(name)]
        assert samples
        assert label in OF_THE_SCRAPER or all(label in labels for labels in samples)


# promtool, which is Prometheus' own


def promtool(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    assert PROMTOOL is not None
    return subprocess.run([PROMTOOL, *words], input=stdin, capture_output=True, text=True, timeout=60)


@needs_promtool
def test_promtool_takes_the_alerts():
    found = promtool("check", "rules", str(DEPLOY / "alerts.yml"))

    assert found.returncode == 0, found.stdout + found.stderr
    assert f"{len(RULES)} rules found" in found.stdout


@needs_promtool
def test_promtool_finds_nothing_wrong_with_what_is_told(service):
    found = promtool("check", "metrics", stdin=scrape(service, TEXT).text)

    assert (found.returncode, found.stdout + found.stderr) == (0, "")
    assert scrape(service, OPENMETRICS).text.endswith("# EOF\n")


# Series as promtool writes them, a value a minute for an hour: `0+600x60` grows by 600 each, `1x60` stays.
WELL = {
    "diskless_ready": "1x60",
    'diskless_requests_total{model="churn", code="ok"}': "0+6000x60",
    'diskless_requests_total{model="churn", code="prediction_failed"}': "0+1x60",
    'diskless_requests_total{model="churn", code="invalid_input"}': "0+100x60",
    'diskless_requests_total{model="churn", code="overloaded"}': "0x60",
    'diskless_latency_seconds_bucket{model="churn", le="0.098304"}': "0+6000x60",
    'diskless_latency_seconds_bucket{model="churn", le="1.048576"}': "0+6000x60",
    'diskless_latency_seconds_bucket{model="churn", le="+Inf"}': "0+6000x60",
    'diskless_queue_requests{model="churn"}': "10x60",
    "diskless_queue_limit_requests": "1000x60",
    'diskless_refused_total{code="unauthorized"}': "0+5x60",
    'diskless_refused_total{code="internal_error"}': "0+1x60",
    'diskless_refreshes_total{outcome="failed"}': "0 0 1x58",
    "diskless_last_sync_timestamp_seconds": "0+60x60",
    'diskless_model_state{model="churn", version="7", state="UNAVAILABLE"}': "0x60",
    'diskless_loads_total{outcome="ok"}': "0+1x60",
    'diskless_loads_total{outcome="no_room"}': "0 0 1x58",
    'diskless_storage_operations_total{storage="r2", outcome="ok"}': "0+10x60",
    'diskless_storage_operations_total{storage="r2", outcome="unavailable"}': "0 0 1x58",
    "diskless_storage_fallback": "0x60",
    "diskless_worker_restarts_total": "0 1x59",
    'diskless_workers{state="serving"}': "4x60",
    "diskless_workers_wanted": "4x60",
    "diskless_memory_used_bytes": "500x60",
    "diskless_memory_limit_bytes": "1000x60",
}
ILL = {
    "DisklessNotReady": {"diskless_ready": "0x60"},
    "DisklessServerErrors": {'diskless_refused_total{code="internal_error"}': "0+100x60"},
    "DisklessModelFails": {  # one of several models: of all requests it is not much
        'diskless_requests_total{model="churn", code="prediction_failed"}': "0+100x60",
        'diskless_requests_total{model="fraud", code="ok"}': "0+20000x60",
    },
    "DisklessSlow": {'diskless_latency_seconds_bucket{model="churn", le="0.098304"}': "0+5500x60"},
    "DisklessOverloaded": {'diskless_requests_total{model="churn", code="overloaded"}': "0+1x60"},
    "DisklessFull": {'diskless_refused_total{code="overloaded"}': "0+1x60"},
    "DisklessQueueFilling": {'diskless_queue_requests{model="churn"}': "501x60"},
    "DisklessInputRefused": {'diskless_requests_total{model="churn", code="invalid_input"}': "0+2000x60"},
    "DisklessKeysRefused": {'diskless_refused_total{code="unauthorized"}': "0+90x60"},
    "DisklessRefreshFailing": {
        'diskless_refreshes_total{outcome="failed"}': "0+1x60",
        "diskless_last_sync_timestamp_seconds": "0x60",
    },
    "DisklessVersionUnavailable": {'diskless_model_state{model="churn", version="7", state="UNAVAILABLE"}': "1x60"},
    "DisklessLoadsFailing": {'diskless_loads_total{outcome="no_room"}': "0+1x60"},
    "DisklessStorageFails": {'diskless_storage_operations_total{storage="r2", outcome="unavailable"}': "0+5x60"},
    "DisklessReadsCopy": {"diskless_storage_fallback": "1x60"},
    "DisklessWorkersRestarting": {"diskless_worker_restarts_total": "0+1x60"},
    "DisklessWorkersMissing": {'diskless_workers{state="serving"}': "3x60"},
    "DisklessMemoryShort": {"diskless_memory_used_bytes": "950x60"},
}


def scene(series: dict[str, str], *alerts: str) -> dict[str, Any]:
    """A test in promtool's form: these alerts are firing after three quarters of an hour of such series, and no others."""
    firing = [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in alerts]
    query = 'count by (alertname) (ALERTS{alertstate="firing"})'
    return {
        "interval": "1m",
        "input_series": [
            {"series": re.sub(r"\A(\w+)\{?", r'\1{instance="one",', name).removesuffix("}") + "}", "values": values}
            for name, values in series.items()
        ],
        "promql_expr_test": [{"expr": query, "eval_time": "45m", "exp_samples": firing}],
    }


@needs_promtool
def test_each_alert_comes_when_it_should_and_no_other_does(tmp_path):
    assert {*ILL} == {rule["alert"] for rule in RULES}
    scenes = [scene(WELL), *(scene(WELL | changed, alert) for alert, changed in ILL.items())]
    tests = {"rule_files": [str(DEPLOY / "alerts.yml")], "evaluation_interval": "1m", "tests": scenes}
    (tmp_path / "test.yml").write_text(json.dumps(tests))

    found = promtool("test", "rules", str(tmp_path / "test.yml"))

    assert found.returncode == 0, found.stdout + found.stderr
