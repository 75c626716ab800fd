"""The table and the chart of the CPU results: benchmarks/results/table.md and chart.svg.

Made from the newest row of each case in benchmarks/results/*.jsonl, by `python -m benchmarks`. The
table also goes into docs/benchmarks.md, and what the other benchmarks measured into details.md and
docs/benchmarks.md; runs end to end, and the time to a loss, go into README.md and, in full, into
docs/benchmarks.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

from benchmarks import scaling
from benchmarks.harness import RESULTS, Row, read
from drlora.compare.statistics import interval
from drlora.report.style import save

COLOURS = {"ours": "#0072b2", "masked r_max": "#e69f00", "peft": "#999999"}
NAMES = {"ours": "drlora", "masked r_max": "masked at r_max", "peft": "PEFT LoRA"}
HEAD = [
    "| case | drlora / frozen | p20 - p80 | masked / frozen | PEFT / drlora | of PEFT's memory |",
    "|---|---|---|---|---|---|",
]
ROOT = RESULTS.parents[1]
PAGES = (ROOT / "docs" / "benchmarks.md",)
BEGIN, END = "<!-- benchmarks -->", "<!-- end of benchmarks -->"
TO_END, END_TO_END = "<!-- end to end -->", "<!-- end of end to end -->"
TO_LOSS, END_TO_LOSS = "<!-- to the loss -->", "<!-- end of to the loss -->"
DETAILS, END_DETAILS = "<!-- details -->", "<!-- end of details -->"
QUALITY = ROOT / "experiments" / "realistic" / "sixteen_bits.json"
IN_16_BITS, END_IN_16_BITS = "<!-- 16 bits -->", "<!-- end of 16 bits -->"
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
    save(figure, path)


def details() -> str:
    """What is measured beside the cases of the table: the profile, 16 bits, the full size."""
    return "\n".join(["#### Milliseconds, and the least", "", *_profile(), "",
                      "#### Products of one core, GFLOP/s", "", *_products(), "",
                      "#### OLMoE-1B-7B on a CPU", "", *_full_size(), ""])  # fmt: skip


def _profile() -> list[str]:
    rows = list({row["case"]: row for row in read("profile")}.values())
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["by_kind_ms"]))
    lines = _head(["case", "one core", "least", *kinds, "Python, views", "all cores", "least",
                   "over frozen", "at the limit", "PEFT / drlora", "at the limit"])  # fmt: skip
    for row in rows:
        cells = [row["case"].removeprefix("profile "), f"{row['one_core_ms']:.0f}"]
        cells += [f"{row['least_ms']:.0f}"]
        cells += [f"{row['by_kind_ms'].get(kind, 0):.0f}" for kind in kinds]
        cells += [f"{row['python_and_views_ms']:.0f}", f"{row['all_cores_ms']:.0f}",
                  f"{row['least_all_cores_ms']:.0f}", f"{row['to_frozen']:.2f}",
                  f"{row['least_to_frozen']:.2f}", f"{row['peft_over_ours']:.1f}",
                  f"{row['peft_over_least']:.1f}"]  # fmt: skip
        lines.append(_line(cells))
    return lines


def _products() -> list[str]:
    rows = newest("products")
    ways = list(dict.fromkeys(way for _, way in rows))
    lines = _head(["product", *ways])
    for case in dict.fromkeys(case for case, _ in rows):
        if case.endswith(" 128 rows"):
            lines.append(_line([case, *(f"{rows[case, way]['gflops']:.1f}" for way in ways)]))
    return lines


def _full_size() -> list[str]:
    lines = _head(["layers, tokens", "implementation", "seconds a step", "peak memory"])
    for (case, kind), row in newest("full_size").items():
        name = case.removeprefix("full size OLMoE-1B-7B ").replace(" bf16", "")
        peak = row.get("peak_gb") or row["computed_peak_gb"]
        how = "" if "peak_gb" in row else ", computed from the two sizes above"
        seconds = ", ".join(f"{value:.0f}" for value in row.get("seconds", []))
        lines.append(_line([name, NAMES.get(kind, kind), seconds, f"{peak:.1f} GB{how}"]))
    return lines


def end_to_end(*, in_full: bool) -> str:
    """`drlora train` beside a script of TRL and PEFT; in full with start-up, losses and where."""
    rows = newest("end_to_end")
    names = {"embedded": "the embedded model", "slice": "two layers of OLMoE-1B-7B"}
    cases = list(dict.fromkeys(case for case, _ in rows))
    more = ["to the first step", "held-out loss at the end", "rounds"] if in_full else []
    lines = _head(["a whole run", "program", "tokens a second", "peak memory", *more])
    for case in cases:
        name, dtype, how = case.removeprefix("end to end ").split(", ", 2)
        for kind, about in ((kind, row) for (each, kind), row in rows.items() if each == case):
            faster = about["tokens_per_s_over_other"]
            is_mine = kind == "drlora train"
            cells = [f"{names[name]}, {dtype}, {how.partition(' of ')[2].partition(',')[0]} a step"
                     if is_mine else "", f"`{kind}`" if is_mine else kind,
                     f"{about['tokens_per_s']:,.0f}" + (f" ({faster:.2g} x)" if is_mine else ""),
                     f"{about['peak_bytes'] / 1e9:.2f} GB"]  # fmt: skip
            if in_full:
                loss = list(about["held_out"].values())[-1]
                cells += [f"{about['startup_s']:.1f} s", f"{loss:.3f}", str(about["rounds"])]
            lines.append(_line(cells))
    return "\n".join(lines) + "\n" + (f"\n{_origin([*rows.values()])}" if in_full else "")


def time_to_loss(*, in_full: bool) -> str:
    """Seconds until the held-out loss that TRL and PEFT end with, from the start of the process."""
    rows = newest("to_the_loss")
    arms = list(dict.fromkeys(arm for _, arm in rows))
    if not in_full:
        lines = _head(["seconds until TRL + PEFT's held-out loss at the end", *map(_program, arms)])
        for case in dict.fromkeys(case for case, _ in rows):
            theirs = rows[case, arms[0]]
            cells = [_sooner(rows[case, arm], theirs, with_start=True) for arm in arms]
            lines.append(_line([_said_of(case), *cells]))
        return "\n".join(lines) + "\n"
    lines = _head(["a whole run", "program", "rate", "tokens a second", "to the first step",
                   "held-out loss at the end", "seconds of steps until TRL + PEFT's",
                   "with the start", "seeds"])  # fmt: skip
    for (case, arm), row in rows.items():
        theirs = rows[case, arms[0]]
        lines.append(_line([_said_of(case) if arm == arms[0] else "", _program(arm),
                            f"{row['rate']:g}", f"{row['tokens_per_s']:,.0f}",
                            f"{row['startup_s']:.1f} s", f"{fmean(row['held_out']):.3f}",
                            *(_sooner(row, theirs, with_start=with_start)
                              for with_start in (False, True)),
                            str(len(row["seeds"]))]))  # fmt: skip
    return "\n".join(lines) + f"\n\n{_origin([*rows.values()])}"


def _said_of(case: str) -> str:
    name, dtype, how = case.removeprefix("to the loss ").split(", ", 2)
    model = {"embedded": "the embedded model", "slice": "two layers of OLMoE-1B-7B"}[name]
    return f"{model}, {dtype}, {how.rpartition(',')[0]}"


def _program(arm: str) -> str:
    """With code words marked."""
    name, _, method = arm.partition(", ")
    said = name if name.startswith("TRL") else f"`{name}`"
    return f"{said}, `{method}`" if method else said


def _sooner(row: Row, theirs: Row, *, with_start: bool) -> str:
    """Mean seconds, and how many times as soon as TRL and PEFT: mean and range over the seeds."""
    starts = [one["startup_s"] if with_start else 0 for one in (row, theirs)]
    both = zip(row["goal_s"], theirs["goal_s"], strict=True)
    pairs = [(mine + starts[0], other + starts[1]) for mine, other in both if mine]
    if not pairs:
        return f"not reached in {fmean(row['whole_s']) + starts[0]:.0f}"
    said = f"{fmean(mine for mine, _ in pairs):.0f}"
    if row is not theirs:
        ratios = [other / mine for mine, other in pairs]
        between = f", {min(ratios):.1f} to {max(ratios):.1f}" if len(ratios) > 1 else ""
        said += f" ({fmean(ratios):.1f} x{between})"
    missed = len(row["seeds"]) - len(pairs)
    return said + (f"; not reached by {missed} of {len(row['seeds'])} seeds" if missed else "")


def quality_in_16_bits() -> str:
    """Held-out loss by step of PEFT and drlora beside the same bfloat16 weights, over seeds."""
    kept = json.loads(QUALITY.read_text("utf-8"))
    how, seeds = kept.pop("how"), kept
    peft, ours = "peft bfloat16", "drlora bfloat16"
    runs = {arm: {seed: of[arm] for seed, of in seeds.items() if arm in of}
            for arm in dict.fromkeys(arm for of in seeds.values() for arm in of)}  # fmt: skip
    lines = _head(["step", *runs, "PEFT over drlora, both bfloat16", "entries that PEFT swallows"])
    for step in next(iter(runs[peft].values()))["loss"]:
        above = [100 * (runs[peft][seed]["loss"][step] / run["loss"][step] - 1)
                 for seed, run in runs[ours].items() if seed in runs[peft]]  # fmt: skip
        found = interval(above)
        means = [fmean(run["loss"][step] for run in of.values()) for of in runs.values()]
        lost = fmean(run["swallowed"][step] for run in runs[peft].values())
        bounds = f" [{found.low:.1f}, {found.high:.1f}]" if found.sd else ""
        lines.append(_line([step, *(f"{mean:.4f}" for mean in means),
                            f"{found.mean:+.1f} %{bounds}", f"{lost:.0%}"]))  # fmt: skip
    about = [f"{arm} {len(of)} seeds, {fmean(run['cpu_s_a_step'] for run in of.values()):.1f}"
             for arm, of in runs.items()]  # fmt: skip
    places = {run.get("processor") for of in runs.values() for run in of.values()} - {None}
    return "\n".join([
        *lines, "",
        f"Rank {how['rank']}, {how['batch']} examples a step, rate {how['rate']:g}. Seeds, and CPU "
        f"seconds a step beside other work: {'; '.join(about)}. torch {how['torch']}; "
        f"{', '.join(sorted(places))}.", "",
    ])  # fmt: skip


def _head(cells: list[str]) -> list[str]:
    return [_line(cells), "|" + "---|" * len(cells)]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def fill(page: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Put the text between the marks of a page, if it has them."""
    before, mark, rest = page.read_text("utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if mark and closed:
        page.write_text(f"{before}{begin}\n{text}{end}{after}", "utf-8")


def write() -> str:
    """Make the files from the rows that are there, and fill the pages; returns the table."""
    timed = timed_rows()
    dynamics = newest("dynamics")
    last = max((row["date"] for row in dynamics.values()), default="")
    dynamics = {key: row for key, row in dynamics.items() if row["date"] == last}
    text = table(timed, newest("memory"), dynamics, read("scaling"))
    (RESULTS / "table.md").write_text(text, "utf-8")
    for page in PAGES:
        fill(page, text)
    more = details()
    (RESULTS / "details.md").write_text(more, "utf-8")
    fill(PAGES[-1], more, DETAILS, END_DETAILS)
    for page, in_full in ((ROOT / "README.md", False), (PAGES[-1], True)):
        fill(page, end_to_end(in_full=in_full), TO_END, END_TO_END)
        fill(page, time_to_loss(in_full=in_full), TO_LOSS, END_TO_LOSS)
    fill(PAGES[-1], quality_in_16_bits(), IN_16_BITS, END_IN_16_BITS)
    for path in (RESULTS / "chart.svg", ROOT / "docs" / "images" / "benchmarks.svg"):
        chart(timed, path)
    return text
