"""How drlora's pictures look, in papers and on pages.

Colours are Okabe and Ito's, which can be told apart with every common colour blindness. The same
contents give the same bytes.
"""

from __future__ import annotations

from typing import Any

INK, PAPER = "#1f2328", "#ffffff"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A2B")
STYLE: Any = {  # of matplotlib
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 9,
    "svg.fonttype": "path",
    "svg.hashsalt": "drlora",
}
