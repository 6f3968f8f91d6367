"""The toy's figure: rows for data, x-prediction and u-prediction, a column per D."""

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from pmf.pictures import new_figure, png_of

__all__ = ["Panel", "draw_panels"]

_LIMIT = 2.5  # axis limit in standard deviations of the data
_DRAWN = 4096  # maximum number of points per panel
_COLOURS = ("#404040", "#1f6fb4", "#c8451b")


class Panel(NamedTuple):
    """Points in the plane [N, 2], and the two numbers below them."""

    points: Tensor
    wasserstein: float
    off_plane: float


def draw_panels(rows: Sequence[tuple[str, Sequence[Panel]]], columns: Sequence[str], caption: str) -> bytes:
    """A PNG with a labelled row of panels for each entry of `rows`; needs matplotlib."""
    size, letters = 2.5, 38  # panel size in inches and in characters of the caption
    figure = new_figure(size * len(columns) + 0.6, (size + 0.35) * len(rows) + 0.6)
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for i, ((name, panels), colour) in enumerate(zip(rows, _COLOURS, strict=True)):
        grid[i][0].set_ylabel(name, fontsize=12)
        for axes, panel in zip(grid[i], panels, strict=True):
            _draw_panel(axes, panel, colour)
    for axes, name in zip(grid[0], columns, strict=True):
        axes.set_title(name, fontsize=12)
    figure.supxlabel(textwrap.fill(caption, letters * len(columns)), fontsize=9)
    return png_of(figure)


def _draw_panel(axes: Any, panel: Panel, colour: str) -> None:
    axes.scatter(*panel.points[:_DRAWN].T.tolist(), s=1.5, c=colour, alpha=0.5, linewidths=0)
    axes.set(xlim=(-_LIMIT, _LIMIT), ylim=(-_LIMIT, _LIMIT), aspect="equal", xticks=[], yticks=[])
    axes.set_xlabel(f"W = {panel.wasserstein:.3f}   off plane {_short(panel.off_plane)}", fontsize=10)


def _short(value: float) -> str:
    """Three decimals below 1, fewer above; rounding errors print as 0."""
    if value < 5e-5:
        return "0"
    return f"{value:.3f}" if value < 1 else f"{value:.1f}"
