"""A comparison as a picture: held-out loss over the memory that live blocks take, a point a row."""

import re
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stackwise_jax.errors import UserError


def plot(found: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Writes the rows that did not fail as a picture; seeds of a row are one point, the bar from the least to the most.

    Args:
      found: rows by name, as `compare` writes them.
      path: its suffix says what it is written as: .svg, .png or .pdf.

    Raises:
      UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('--plot needs matplotlib; install it with: pip install "stackwise-jax[plot]"') from None
    panels = {kind: of for kind, of in by_objective(found).items() if of}
    figure = Figure(figsize=(6.4 * len(panels), 5.2), layout="constrained")
    for axes, (kind, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, seeds in rows.items():
            losses = [row["final"]["loss"] for row in seeds]
            x, y = seeds[0]["block_state_bytes"] / 2**30, statistics.mean(losses)
            axes.errorbar(x, y, yerr=[[y - min(losses)], [max(losses) - y]], fmt="o", color="black", markersize=4)
            axes.annotate(name, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=8)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("weights, moments and gradients of live blocks, GiB")
        axes.set_ylabel(f"held-out nats a token, {kind}")
        axes.margins(x=0.4)
        axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def by_objective(found: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """{objective: {row: its seeds}}, since losses of different objectives have no common axis."""
    panels: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for name, row in found.items():
        if "failed" not in row:
            panels[row["config"]["objective"]["name"]][re.sub("#.*", "", name)].append(row)
    return panels
