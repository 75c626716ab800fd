"""How drlora's pictures look, in papers and on pages.

Colours are Okabe and Ito's, which can be told apart with every common colour blindness. The same
contents give the same bytes, if `save` writes them.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
# A hash of all digits of where axes are, of which a layout's solver finds other last ones at times.
_LONG = re.compile(rb"(?<![\w.#])[1-9]\d*\.\d{3,}(?![\w.])")
_CLIP = re.compile(rb'(?<=[#"])p[0-9a-f]{10}(?=[)"])')


def save(figure: Figure, path: Path, **how: Any) -> None:
    """Write a picture in the format of the path's ending; an SVG the same to the byte each time.

    Args:
        figure: the picture.
        path: of the file.
        how: what else `Figure.savefig` takes, `format` too.
    """
    if how.get("format", path.suffix.removeprefix(".")) != "svg":
        figure.savefig(path, **how)
        return
    drawn = io.BytesIO()
    figure.savefig(drawn, **{**how, "format": "svg", "metadata": {"Date": None}})
    path.write_bytes(with_short_numbers(with_numbered_clips(drawn.getvalue())))


def with_short_numbers(svg: bytes) -> bytes:
    """The SVG with two decimals, a hundredth of a point, of numbers from 1 on: half the bytes.

    >>> with_short_numbers(b'x="118.938507" scale(0.015625) -2.999')
    b'x="118.94" scale(0.015625) -3'
    """

    def shortened(found: re.Match[bytes]) -> bytes:
        return f"{float(found[0]):.2f}".rstrip("0").rstrip(".").encode()

    return _LONG.sub(shortened, svg)


def with_numbered_clips(svg: bytes) -> bytes:
    """The SVG with the names of what axes are cut to in the order in which they are met.

    >>> with_numbered_clips(b'url(#p0123456789) id="pabcdefabcd" id="p0123456789"')
    b'url(#clip0) id="clip1" id="clip0"'
    """
    names: dict[bytes, bytes] = {}
    return _CLIP.sub(lambda found: names.setdefault(found[0], b"clip%d" % len(names)), svg)
