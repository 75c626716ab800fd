"""Open a report in headless Chromium and check what a reader needs: docs/report.md has the result.

python tools/check_report.py RUN [--images FOLDER] [--axe axe.min.js] [--chromium chromium]

Needs `pip install playwright` and a Chromium (Debian: apt-get install chromium); for accessibility
the file axe.min.js of the npm package axe-core. Checked at 1280 and 390 pixels, in light and dark:
no message on the console, nothing asked of a network, no scrolling sideways, the slider changes
the map, choosing an expert shows its curves, smoothing and epochs change the loss and change it
back, answers unfold, axe-core finds no serious or critical fault; and the time until it is ready.
A page that follows a run loads itself anew and keeps what was chosen.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from drlora.report.write import write_report

WIDTHS = (1280, 390)
SCHEMES = ("light", "dark")


def check(browser: Browser, page_file: Path, width: int, scheme: Any, options: Any) -> dict:
    """One view of the page; raises AssertionError with what is wrong."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, device_scale_factor=1
    )
    page = context.new_page()
    messages: list[str] = []
    asked: list[str] = []
    page.on("console", lambda m: messages.append(f"{m.type}: {m.text}"))
    page.on("pageerror", lambda error: messages.append(f"error: {error}"))
    page.on("request", lambda r: asked.append(r.url))
    page.goto(page_file.as_uri())
    page.wait_for_selector("html[data-ready=true]")
    page.evaluate("() => new Promise(requestAnimationFrame)")
    opened_ms = page.evaluate("() => performance.now()")
    found: dict[str, Any] = {"width": width, "scheme": scheme, "opened_ms": round(opened_ms)}
    if options.images:
        page.wait_for_timeout(300)
        page.screenshot(path=options.images / f"report-{width}-{scheme}.png", full_page=True)
    assert len(asked) == 1, asked
    overflow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert overflow <= 0, f"{overflow} pixels beyond the window"
    found.update(move_slider(page))
    found.update(choose_expert(page))
    found.update(toggle(page))
    found["answers"] = unfold_answers(page)
    if options.axe:
        found["axe"] = axe_faults(page, options.axe)
        assert not found["axe"]["serious"], found["axe"]
    assert not messages, messages
    context.close()
    return found


def pixels(page: Page, chart: str) -> str:
    """What a chart shows, as one string."""
    page.evaluate("() => new Promise(requestAnimationFrame)")
    return page.evaluate(f"document.querySelector('#{chart} canvas').toDataURL()")


def move_slider(page: Page) -> dict[str, Any]:
    """By keyboard, to the first and the last event."""
    slider = page.locator("#time")
    shown = []
    slider.focus()
    for key in ("Home", "ArrowRight", "End"):
        page.keyboard.press(key)
        shown.append((pixels(page, "ranks"), page.locator("#now").inner_text()))
    assert len({picture for picture, _ in shown}) == 3, "the slider does not change the map"
    assert len({text for _, text in shown}) == 3, [text for _, text in shown]
    return {"slider": shown[-1][1]}


def choose_expert(page: Page) -> dict[str, Any]:
    """By list, by keyboard on the map, and by pointing."""
    before = {name: pixels(page, f"expert-{name}") for name in ("rank", "routing", "saliency")}
    layer, expert = page.locator("#layer"), page.locator("#expert")
    other = "1" if expert.input_value() != "1" else "2"
    expert.select_option(other)
    changed = [n for n, picture in before.items() if pixels(page, f"expert-{n}") != picture]
    assert changed == list(before), f"only {changed} changed with the expert"
    page.locator("#ranks").focus()
    page.keyboard.press("ArrowRight")
    assert expert.input_value() == str(int(other) + 1)
    page.locator("#ranks").scroll_into_view_if_needed()
    box = page.locator("#ranks").bounding_box()
    assert box is not None
    chosen = (layer.input_value(), expert.input_value())
    page.mouse.click(box["x"] + 0.35 * box["width"], box["y"] + 0.3 * box["height"])
    assert (layer.input_value(), expert.input_value()) != chosen, "pointing chooses nothing"
    return {"chosen": page.locator("#chosen").inner_text()}


def toggle(page: Page) -> dict[str, Any]:
    """Smoothing, and epochs where the log has them: each changes the loss, and back."""
    found = {}
    for name in ("smooth", "epochs"):
        box = page.locator(f"#{name}")
        if not box.is_visible():
            continue
        before = pixels(page, "loss")
        box.check()
        assert pixels(page, "loss") != before, f"{name} changes nothing"
        box.uncheck()
        assert pixels(page, "loss") == before, f"{name} does not go back"
        found[name] = "changes the loss"
    return found


def unfold_answers(page: Page) -> int:
    """How many answers can be read."""
    rows = 0
    for details in page.locator("section[aria-labelledby=h-answers] details").all():
        details.locator("summary").click()
        rows += details.locator("tbody tr").count()
        assert details.locator("tbody tr").first.is_visible(), "answers stay folded"
        details.locator("summary").click()
    return rows


def follow(browser: Browser, runs: list[Path], folder: Path) -> dict[str, Any]:
    """A page of a run under way: it loads itself anew, as it was left."""
    page_file = write_report(runs, folder / "followed.html", "html", refresh=2)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    messages: list[str] = []
    page.on("console", lambda m: messages.append(f"{m.type}: {m.text}"))
    page.on("pageerror", lambda error: messages.append(f"error: {error}"))
    page.goto(page_file.as_uri())
    page.wait_for_selector("html[data-ready=true]")
    page.locator("#smooth").check()
    page.locator("#expert").select_option("2")
    page.wait_for_event("load", timeout=30_000)
    page.wait_for_selector("html[data-ready=true]")
    assert page.locator("#smooth").is_checked(), "smoothing is lost"
    assert page.locator("#expert").input_value() == "2", "the expert is lost"
    assert not messages, messages
    page.close()
    return {"kept": ["smooth", "expert"]}


def axe_faults(page: Page, axe: Path) -> dict[str, Any]:
    """What axe-core finds."""
    page.evaluate(axe.read_text("utf-8"))
    violations = page.evaluate("async () => (await axe.run()).violations")
    named = [f"{v['impact']}: {v['id']} ({v['nodes'][0]['html'][:80]})" for v in violations]
    serious = [n for n in named if n.startswith(("serious", "critical"))]
    return {"serious": serious, "other": [n for n in named if n not in serious]}


def main() -> None:
    """Write the report, check every view, print what was found."""
    parser = argparse.ArgumentParser(description="Check a report in headless Chromium.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--images", type=Path, help="folder for screenshots")
    parser.add_argument("--axe", type=Path, help="axe.min.js of axe-core")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="the browser")
    options = parser.parse_args()
    if options.images:
        options.images.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = write_report(options.runs, Path(folder) / "report.html")
        browser = playwright.chromium.launch(
            executable_path=options.chromium, args=["--no-sandbox"]
        )
        views = [check(browser, page_file, w, s, options) for w in WIDTHS for s in SCHEMES]
        followed = follow(browser, options.runs, Path(folder))
        size = page_file.stat().st_size
        found = {"bytes": size, "chromium": browser.version, "views": views, "followed": followed}
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
