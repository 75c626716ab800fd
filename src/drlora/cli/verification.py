"""What `drlora verify` prints: a page for a person."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from drlora.errors import counted
from drlora.verification.findings import Finding
from drlora.verification.verify import Verification

_KINDS = {
    "packed": "PEFT's packed tensors (target_parameters)",
    "stacked": "stacked tensors (E, ., .)",
    "apart": "tensors of each expert",
    "pool": "drlora's rank pools",
}
_PACKING = {
    "right": "B is packed as PEFT reads it (expert fastest)",
    "wrong": "B is packed expert by expert, which PEFT reads otherwise",
    "not told": "how B is packed cannot be told from its columns; --merged shows it",
}


def print_verification(found: Verification, console: Console) -> None:
    """Verdict first, then what was found, then who reads it."""
    faults = [finding for finding in found.findings if finding.is_fault]
    warnings = [finding for finding in found.findings if not finding.is_fault]
    verdict = "sound" if found.is_sound else counted(len(faults), "fault")
    console.print(f"adapter  {found.adapter} ({found.type}): {verdict}")
    console.print(f"base     {found.base or 'not at hand; name it with --base to check more'}")
    kinds = ", ".join(_KINDS[kind] for kind in found.layouts) or "none on experts"
    low, high = found.ranks
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    console.print(f"experts  {found.experts} in {counted(found.blocks, 'block')}, {ranks}; {kinds}")
    if found.packing is not None:
        console.print(f"packing  {_PACKING[found.packing]}")
    if found.shares:
        shares = sorted(found.shares.values())
        console.print(
            f"updates  {shares[0]:.2%} to {shares[-1]:.2%} of the weights that they are added to "
            f"(each matrix's largest)"
        )
    if found.merged:
        kept = sorted(one.share for one in found.merged)
        console.print(f"merged   {kept[0]:.1%} to {kept[-1]:.1%} of each update is in the weights")
    for line in _by_name(faults):
        console.print(f"FAULT    {line}")
    for line in _by_name(warnings):
        console.print(f"warning  {line}")
    if found.engines:
        table = Table(box=None, pad_edge=False)
        for name in ("engine", "reads it", "", "how this is known"):
            table.add_column(name)
        for reading in found.engines:
            reads = {True: "yes", False: "no", None: "not tried"}[reading.reads]
            table.add_row(f"{reading.engine} {reading.version}", reads, reading.why, reading.seen)
        console.print(table)


def _by_name(findings: list[Finding]) -> list[str]:
    """A line each kind of finding: the first, and in how many other places it is."""
    lines = []
    for name in dict.fromkeys(finding.name for finding in findings):
        same = [finding for finding in findings if finding.name == name]
        more = f" (and {counted(len(same) - 1, 'other place')})" if len(same) > 1 else ""
        lines.append(f"{same[0]}{more}")
    return lines
