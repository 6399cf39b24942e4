"""A run's figures on their way out: PNG curves, TensorBoard, a line at the terminal.

Names with "validation" are of held-back calls. matplotlib and TensorBoard are only loaded here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from personaplex.files import replacing

PANELS = (  # title, figures
    ("loss", ("loss", "validation loss")),
    ("text: nats a piece of a word", ("words", "validation words")),
    ("audio: nats a code", ("semantic", "validation semantic", "acoustic", "validation acoustic")),
    ("pieces of words that are the likeliest", ("words right", "validation words right")),
)


def draw(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """All figures over the steps, as a PNG. Raises OSError."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3 * len(PANELS)))
    FigureCanvasAgg(figure)
    for panel, (title, names) in zip(figure.subplots(len(PANELS), 1), PANELS, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in history if name in row]
            if points:
                style = "o-" if name.startswith("validation") else "-"
                panel.plot(*zip(*points, strict=True), style, markersize=3, label=name)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        panel.grid(alpha=0.3)
        if panel.has_data():
            panel.legend(fontsize=7)
    figure.tight_layout()
    with replacing(path) as part:
        figure.savefig(part, format="png")


class Board:
    """TensorBoard's event files, as if the run had never been broken off."""

    def __init__(self, folder: Path, step: int) -> None:
        """`step`: the first that is to come; what earlier processes wrote from there on is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step)

    def add(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name.replace(" ", "_"), value, int(row["step"]))

    def close(self) -> None:
        self._writer.close()


def line(row: Mapping[str, float]) -> str:
    """One row in words."""
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "step")
