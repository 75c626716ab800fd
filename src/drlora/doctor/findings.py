"""What the doctor says of one thing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["works", "absent", "fails"]


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        what: was tried.
        verdict: `works`; `absent`, which nothing needs but what asks for it; or `fails`.
        said: what was found, in a few words.
        way_out: what to do; empty of what works.
    """

    what: str
    verdict: Verdict
    said: str
    way_out: str = ""


@dataclass(frozen=True)
class Health:
    """All lines."""

    findings: tuple[Finding, ...]

    @property
    def is_well(self) -> bool:
        """Whether nothing fails; what is absent is no fault."""
        return not any(finding.verdict == "fails" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"well": self.is_well, "findings": [asdict(finding) for finding in self.findings]}


def works(what: str, said: str) -> Finding:
    return Finding(what, "works", said)
