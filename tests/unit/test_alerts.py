"""The Grafana dashboard and the alert rules: what they name exists, and the rules fire when they should."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "systemd" / "alerts.yml"
WORD = re.compile(r"\b(?:metaserver|chunkserver|dfsmount)_[a-z0-9_]+\b")
FAMILY = re.compile(r'(?:Counter|Gauge)MetricFamily\(\s*"([a-z_]+)"')
HISTOGRAM = re.compile(r'families\(\s*[^,]+, "([a-z_]+)"')


def exposed() -> set[str]:
    """All series that the three programs can show, from the sources of their collectors."""
    found = set()
    for name in ("metaserver/http.py", "chunkserver/http.py", "dfsmount/metrics.py"):
        text = (ROOT / name).read_text()
        for match in FAMILY.finditer(text):
            counter = match.group(0).startswith("Counter")
            found.add(match.group(1) + ("_total" if counter else ""))
        for prefix in HISTOGRAM.findall(text):
            found |= {f"{prefix}_duration_seconds_{part}" for part in ("bucket", "count", "sum")}
            found.add(f"{prefix}_failures_total")
    metaserver = (ROOT / "metaserver/http.py").read_text()
    return found | {f"metaserver_{name}" for name in re.findall(r'^ +"([a-z_]+)": \("', metaserver, re.MULTILINE)}


def test_the_collectors_were_understood() -> None:
    assert {"metaserver_epoch", "metaserver_requests_total", "chunkserver_chunks"} <= exposed()
    assert "dfsmount_operation_duration_seconds_bucket" in exposed()
    assert "metaserver_nonsense" not in exposed()


def test_every_query_of_the_dashboard_names_metrics_that_exist() -> None:
    panels = json.loads((ROOT / "docs/grafana.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    assert len(queries) >= 15
    for query in queries:
        assert WORD.findall(query), query
        assert set(WORD.findall(query)) <= exposed(), query


def test_every_rule_names_metrics_that_exist() -> None:
    text = RULES.read_text()
    expressions = re.findall(r"expr: (.*?)\n +for|expr: (.*?)\n +labels", text, re.DOTALL)
    names = {word for pair in expressions for part in pair for word in WORD.findall(part)}
    assert "metaserver_chunks" in names
    assert names <= exposed()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian package prometheus)")
def test_the_rules_fire_when_they_should_and_only_then() -> None:
    tests = Path(__file__).with_name("alerts_test.yml")
    done = subprocess.run(["promtool", "test", "rules", tests], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
