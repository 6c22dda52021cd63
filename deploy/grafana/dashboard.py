"""The Grafana dashboard, drawn from the table in `panels`.

    python deploy/grafana/dashboard.py > deploy/grafana/dashboards/headgate.json

Where a panel stands on the screen follows from its place in the table.
"""

import json
import sys

from panels import ROWS, Panel

COLUMNS = 24
HEIGHT = 8
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard() -> dict[str, object]:
    """The whole, as Grafana reads it."""
    return {
        "uid": "headgate",
        "title": "Headgate",
        "tags": ["headgate", "llm"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "",
        "templating": {"list": [_datasource(), _pools()]},
        "panels": _panels(),
    }


def _datasource() -> dict[str, object]:
    return {
        "name": "datasource",
        "type": "datasource",
        "query": "prometheus",
        "current": {"text": "Prometheus", "value": "prometheus"},
    }


def _pools() -> dict[str, object]:
    query = "label_values(headgate_is_leader, pool)"
    return {
        "name": "pool",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": "pool"},
        "definition": query,
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _panels() -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    down = 0
    for title, panels in ROWS.items():
        found.append(
            {
                "id": len(found) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": down},
            }
        )
        down, across = down + 1, 0
        for panel in panels:
            if across + panel.width > COLUMNS:
                down, across = down + HEIGHT, 0
            place = {"h": HEIGHT, "w": panel.width, "x": across, "y": down}
            found.append({"id": len(found) + 1, "gridPos": place, **_drawn(panel)})
            across += panel.width
        down += HEIGHT
    return found


def _drawn(panel: Panel) -> dict[str, object]:
    lines: dict[str, object] = {
        "drawStyle": "line",
        "fillOpacity": 20 if panel.stacked else 5,
        "showPoints": "never",
    }
    if panel.stacked:
        lines["stacking"] = {"mode": "normal", "group": "A"}
    defaults: dict[str, object] = {"unit": panel.unit, "min": 0}
    if panel.title.startswith("Slack"):
        del defaults["min"]  # below zero is what it is looked at for
    if panel.top is not None:
        defaults["max"] = panel.top
    if panel.kind == "timeseries":
        defaults["custom"] = lines
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True}}
        if panel.kind == "timeseries"
        else {},
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "expr": query,
                "legendFormat": legend,
                "datasource": SOURCE,
            }
            for place, (query, legend) in enumerate(panel.queries)
        ],
    }


if __name__ == "__main__":
    json.dump(dashboard(), sys.stdout, indent=1)
    sys.stdout.write("\n")
