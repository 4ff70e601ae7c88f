"""The picture of a run's losses."""

from __future__ import annotations

import pathlib

from matplotlib.figure import Figure

from experiments.run import files


def draw(lines: list[dict], path: pathlib.Path, title: str):
    """Plots the losses of training and validation over the steps.

    Args:
      lines: of the log, see ``log.read_metrics``.
      path: the PNG file.
      title: of the picture.

    Raises:
      OSError: the file cannot be written.
    """
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("loss", "training", "-"), ("validation_loss", "validation", "o-")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            style = style if len(points) > 1 else "o"  # a line of one point is invisible
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with files.replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
