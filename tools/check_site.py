"""Open the built site in headless Chromium and check what a reader needs.

    make docs && python tools/check_site.py --axe axe.min.js [--images FOLDER]

Needs `pip install playwright` and a Chromium (Debian: apt-get install chromium); axe.min.js is of
the npm package axe-core. Every page at 1280 and 390 pixels, in light and dark: no message on the
console, nothing asked of another host, no scrolling sideways, axe-core finds no serious or critical
fault. The search finds a word.
"""

from __future__ import annotations

import argparse
import functools
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).parents[1]
WIDTHS, SCHEMES = (1280, 390), ("light", "dark")
PICTURED = ("index", "tutorial", "worked-runs", "evidence")


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Nothing."""


def check(browser: Browser, site: str, page_name: str, width: int, scheme: Any,
          options: Any) -> list[str]:  # fmt: skip
    """What is wrong with one view of a page."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    faults: list[str] = []
    page.on("console", lambda m: faults.append(f"{m.type}: {m.text}"))
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on("request", lambda r: None if r.url.startswith((site, "data:", "blob:"))
            else faults.append(f"asks {r.url}"))  # fmt: skip
    page.goto(site + ("" if page_name == "index" else f"{page_name}/"), wait_until="load")
    page.wait_for_timeout(150)
    over = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    if over > 0:
        faults.append(f"{over} pixels beyond the window")
    if options.images and page_name in PICTURED:
        page.screenshot(path=options.images / f"{page_name}-{width}-{scheme}.png")
    page.add_script_tag(path=str(options.axe))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    faults += [
        f"{fault['impact']} {fault['id']}: {fault['nodes'][0]['html'][:140]}"
        for fault in found["violations"]
        if fault["impact"] in ("serious", "critical")
    ]
    if page_name == "index" and width == WIDTHS[0]:
        page.locator("input.md-search__input").click()
        page.keyboard.type("budget", delay=50)
        page.wait_for_selector("li.md-search-result__item", state="attached", timeout=60_000)
    context.close()
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--site", type=Path, default=ROOT / "site")
    parser.add_argument("--axe", type=Path, required=True)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--chromium", default="chromium")
    options = parser.parse_args()
    if options.images:
        options.images.mkdir(parents=True, exist_ok=True)
    serve = functools.partial(_Quiet, directory=str(options.site))
    server = ThreadingHTTPServer(("127.0.0.1", 0), serve)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    site = f"http://127.0.0.1:{server.server_port}/"
    pages = ["index"] + sorted(
        str(path.parent.relative_to(options.site))
        for path in options.site.rglob("index.html")
        if path.parent != options.site
    )
    found: dict[str, list[str]] = {}
    views = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=f"/usr/bin/{options.chromium}", args=["--no-sandbox"]
        )
        for name in pages:
            for width in WIDTHS:
                for scheme in SCHEMES:
                    views += 1
                    faults = check(browser, site, name, width, scheme, options)
                    if faults:
                        found[f"{name} {width} {scheme}"] = faults
        browser.close()
    print(json.dumps({"pages": len(pages), "views": views, "faults": found}, indent=1))
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
