"""docs/llms.txt: every page of the site with its first sentence, for assistants.

    python tools/make_llms.py

Made of mkdocs.yml and the pages; a test holds it. The form is that of llmstxt.org.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import yaml
from made_pages import write_or_check

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "llms.txt"


class _Loader(yaml.SafeLoader):
    """Of mkdocs.yml, which may name Python objects."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def written() -> str:
    """The whole file."""
    site = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), _Loader)  # noqa: S506
    lines = [f"# {site['site_name']}", "", f"> {site['site_description']}", ""]
    for section in site["nav"]:
        ((title, pages),) = section.items()
        lines += [f"## {title}", ""]
        lines += [entry(page) for page in pages]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def entry(page: Any) -> str:
    """A link and what the page is about."""
    name = page if isinstance(page, str) else next(iter(page.values()))
    text = (ROOT / "docs" / name).read_text("utf-8")
    title = text.splitlines()[0].lstrip("# ")
    return f"- [{title}]({name}): {first_sentence(text)}"


def first_sentence(text: str) -> str:
    """Of the first paragraph that is prose, without marks of links and code."""
    for paragraph in re.split(r"\n\s*\n", text)[1:]:
        if re.match(r"[A-Za-z`*\[]", paragraph) and not paragraph.startswith("[!"):
            plain = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", " ".join(paragraph.split()))
            return re.split(r"(?<=\.)\s", plain)[0]
    return ""


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, lambda text: written(), __doc__))
