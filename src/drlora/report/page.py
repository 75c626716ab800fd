"""The report as one HTML file that needs nothing else: text and tables here, charts in report.js.

Everything from a run is escaped, and scripts are allowed by their hash alone, so that no name in a
recipe or a log can run anything or reach a network.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

import yaml

from drlora.report.encode import encode_runs
from drlora.report.facts import COST, SETUP, SUMMARY, Row, lead, table, title
from drlora.report.read import RunRecord


def page(runs: Sequence[RunRecord], refresh: int | None = None) -> str:
    """The HTML of a report on these runs, which loads itself anew after `refresh` seconds."""
    drawn = [run for run in runs if run.maps]
    charts, own = _asset("vendor/echarts.min.js"), _asset("report.js")
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"style-src 'unsafe-inline'; script-src {_hash(charts)} {_hash(own)}"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
{_refresh(refresh)}<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title(runs))}</title>
<style>{_asset("report.css")}</style>
</head>
<body>
<header>
<h1>{escape(title(runs))}</h1>
{"".join(f"<p>{_named(run, runs)}{escape(lead(run))}</p>" for run in runs)}
</header>
<main>
<section aria-labelledby="h-result"><h2 id="h-result">Result</h2>
{_table("Result", runs, table(runs, SUMMARY))}</section>
{_answers(runs)}{_charts(drawn)}
<section aria-labelledby="h-cost"><h2 id="h-cost">Cost</h2>
{_table("Cost", runs, table(runs, COST))}</section>
<section aria-labelledby="h-setup"><h2 id="h-setup">Settings</h2>
{_table("Settings", runs, table(runs, SETUP))}
{_versions(runs)}
{"".join(_recipe(run) for run in runs)}</section>
</main>
<footer><p>Made by <code>drlora report</code> from the files of the run. Charts:
Apache ECharts (Apache License 2.0).</p></footer>
{_scripts(drawn, charts, own)}</body>
</html>
"""


def _refresh(seconds: int | None) -> str:
    return "" if seconds is None else f'<meta http-equiv="refresh" content="{seconds}">\n'


def _answers(runs: Sequence[RunRecord]) -> str:
    """What each run answered, as far as it was kept; folded up."""
    found = []
    for run in runs:
        after = run.measured("after") or {}
        samples = (after.get("match") or {}).get("samples") or after.get("samples") or []
        rows = [(str(s.get("prompt")), [str(s.get("prediction")), _wanted(s)]) for s in samples]
        if rows:
            table = _columns(f"Answers of {run.name}", ("answered", "wanted"), rows)
            found.append(
                f"<details><summary>{escape(f'Answers of {run.name}')}</summary>{table}</details>"
            )
    if not found:
        return ""
    return (
        '<section aria-labelledby="h-answers"><h2 id="h-answers">Answers</h2>\n'
        f"{''.join(found)}</section>\n"
    )


def _wanted(sample: dict[str, Any]) -> str:
    return " / ".join(map(str, sample.get("answers") or ()))


def _charts(runs: Sequence[RunRecord]) -> str:
    """The charts of the runs that have written ranks."""
    if not runs:
        return "<p>Charts follow with the first growth event, or the first checkpoint.</p>"
    return (
        "<noscript><p>The charts need JavaScript; the tables do not.</p></noscript>\n"
        f"{_asset('charts.html')}"
    )


def _scripts(runs: Sequence[RunRecord], charts: str, own: str) -> str:
    if not runs:
        return ""
    return (
        f'<script type="application/json" id="data">{encode_runs(runs)}</script>\n'
        f"<script>{charts}</script>\n<script>{own}</script>\n"
    )


def _asset(name: str) -> str:
    return files("drlora.report").joinpath(name).read_text("utf-8")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _named(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    return f"<strong>{escape(run.name)}</strong>: " if len(runs) > 1 else ""


def _table(caption: str, runs: Sequence[RunRecord], rows: Sequence[Row]) -> str:
    """One row a fact, one column a run; the header with names only where there are several."""
    names = [run.name for run in runs] if len(runs) > 1 else []
    return _columns(caption, names, rows, "run")


def _columns(caption: str, names: Sequence[str], rows: Sequence[Row], first: str = "prompt") -> str:
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    head = f'<thead><tr><th scope="col">{first}</th>{heads}</tr></thead>' if names else ""
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(value)}</td>" for value in values)
        + "</tr>"
        for name, values in rows
    )
    kind = "facts several" if names else "facts"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}, table">'
        f'<table class="{kind}">{head}<tbody>{body}</tbody></table></div>'
    )


def _versions(runs: Sequence[RunRecord]) -> str:
    found = [run.result.get("versions") or {} for run in runs]
    names = list(dict.fromkeys(name for versions in found for name in versions))
    if not names:
        return ""
    rows = [(name, [str(versions.get(name, "–")) for versions in found]) for name in names]
    return f"<details><summary>Versions</summary>{_table('Versions', runs, rows)}</details>"


def _recipe(run: RunRecord) -> str:
    if not run.recipe:
        return ""
    text = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True)
    return (
        f"<details><summary>Recipe of {escape(run.name)}, every setting</summary>"
        f'<pre tabindex="0">{escape(text)}</pre></details>'
    )
