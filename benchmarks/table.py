"""The table and the chart of the CPU results: benchmarks/results/table.md and chart.svg.

Made from the newest row of each case in benchmarks/results/*.jsonl, by `python -m benchmarks`. The
table also goes into docs/benchmarks.md, and into README.md once that has the marks for it.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import scaling
from benchmarks.harness import RESULTS, Row, read

COLOURS = {"ours": "#0072b2", "masked r_max": "#e69f00", "peft": "#999999"}
NAMES = {"ours": "drlora", "masked r_max": "masked at r_max", "peft": "PEFT LoRA"}
HEAD = [
    "| case | drlora / frozen | p20 - p80 | masked / frozen | PEFT / drlora | of PEFT's memory |",
    "|---|---|---|---|---|---|",
]
ROOT = RESULTS.parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
BEGIN, END = "<!-- benchmarks -->", "<!-- end of benchmarks -->"
Newest = dict[tuple[str, str], Row]


def newest(name: str) -> Newest:
    """(case, implementation) -> the row that was appended last."""
    return {(row["case"], row["implementation"]): row for row in read(name)}


def timed_rows() -> Newest:
    """The layers and the training steps."""
    return {**newest("experts_layer"), **newest("train_step")}


def table(timed: Newest, memory: Newest, dynamics: Newest, scaled: list[Row]) -> str:
    """Ratios to the frozen base, PEFT's time over ours, memory above the frozen base; then what
    dynamics cost, and how time scales."""
    lines = list(HEAD)
    for case in dict.fromkeys(case for case, _ in timed):
        mine, slow = timed[case, "ours"], timed.get((case, "masked r_max"))
        used = memory.get((case.replace("step ", "memory "), "ours"))
        cells = [
            case,
            f"{mine['to_frozen']:.2f}",
            f"{mine['to_frozen_p20']:.2f} - {mine['to_frozen_p80']:.2f}",
            f"{slow['to_frozen']:.2f}" if slow else "",
            f"{mine['peft_over_this']:.1f}",
            f"{used['of_peft']:.0%}" if used else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines += [
        f"Dynamics on over fixed ranks, {case.removeprefix('dynamics ')}: {row['to_frozen']:.3f} "
        f"({row['to_frozen_p20']:.3f} - {row['to_frozen_p80']:.3f}).\n"
        for (case, kind), row in dynamics.items()
        if kind == "with dynamics"
    ]
    figures = scaling.verdicts(scaled)
    lines += [f"{name[0].upper()}{name[1:]}: {figure:.2f}.\n" for name, figure in figures.items()]
    return "\n".join(lines) + "\n" + _origin([*timed.values()])


def _origin(rows: list[Row]) -> str:
    """Where the rows come from; each machine and set of versions is named."""
    places = {
        f"{row['device']}; torch {row['torch']}, transformers {row['transformers']}, PEFT "
        f"{row['peft']}; {row['date']}"
        for row in rows
    }
    return "\n".join(f"{place}." for place in sorted(places)) + "\n"


def chart(timed: Newest, path: Path) -> None:
    """Time as a multiple of the frozen base, one group of bars a case."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "drlora"  # the same rows give the same file
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(case for case, _ in timed))
    figure = Figure(figsize=(8, 0.55 * len(cases) + 1.2), layout="constrained")
    axes = figure.subplots()
    for offset, kind in enumerate(COLOURS):
        found = [(n, timed[case, kind]) for n, case in enumerate(cases) if (case, kind) in timed]
        places = [number + 0.27 * (offset - 1) for number, _ in found]
        values = [row["to_frozen"] for _, row in found]
        axes.barh(places, values, height=0.25, color=COLOURS[kind], label=NAMES[kind])
    axes.axvline(1, color="#555555", linewidth=0.8)
    axes.set_yticks(range(len(cases)), cases, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("time as a multiple of transformers' frozen experts (shorter is better)")
    axes.legend(fontsize=8)
    figure.set_facecolor("#ffffff")
    figure.savefig(path, metadata={"Date": None})


def fill(page: Path, text: str) -> None:
    """Put the table between the marks of a page, if it has them."""
    before, mark, rest = page.read_text("utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if mark and end:
        page.write_text(f"{before}{BEGIN}\n{text}{END}{after}", "utf-8")


def write() -> str:
    """Make the files from the rows that are there, and fill the pages; returns the table."""
    timed = timed_rows()
    text = table(timed, newest("memory"), newest("dynamics"), read("scaling"))
    (RESULTS / "table.md").write_text(text, "utf-8")
    for page in PAGES:
        fill(page, text)
    for path in (RESULTS / "chart.svg", ROOT / "docs" / "images" / "benchmarks.svg"):
        chart(timed, path)
    return text
