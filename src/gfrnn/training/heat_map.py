"""Accuracy by cell as a picture: nesting down, length across, as figure 5 of Chung et al. 2015 has it."""

from __future__ import annotations

import io
from pathlib import Path

from gfrnn.runs import replace_file
from gfrnn.training.grid import Share

Panel = dict[tuple[int, int], Share]
"""(nesting, length) -> what was found there."""


def draw(panels: dict[str, Panel], path: Path, title: str, *, gain: bool) -> None:
    """Writes a picture (PNG, SVG or PDF by its name) of shares, or (gain) of differences between shares.

    panels: by what is shown, side by side. A dot marks a gain whose interval leaves zero out.
    """
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    import matplotlib.pyplot as plt
    import numpy as np

    places = next(iter(panels.values()))
    nestings, lengths = sorted({nesting for nesting, _ in places}), sorted({length for _, length in places})
    size = (len(panels) * (1.5 + 0.55 * len(lengths)), 1.5 + 0.55 * len(nestings))
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, (what, panel) in zip(axes[0], panels.items(), strict=True):
        shares = [panel[nesting, length] for nesting in nestings for length in lengths]
        values = 100 * np.array([share.value for share in shares]).reshape(len(nestings), len(lengths))
        most = max(1.0, float(np.abs(values).max()))
        colours = (
            {"cmap": "RdBu_r", "vmin": -most, "vmax": most} if gain else {"cmap": "viridis", "vmin": 0, "vmax": 100}
        )
        picture = axis.imshow(values, aspect="auto", **colours)
        for place, share in enumerate(shares):
            row, column = divmod(place, len(lengths))
            red, green, blue, _ = picture.cmap(picture.norm(values[row, column]))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            text = f"{values[row, column]:+.1f}{_mark(share)}" if gain else f"{values[row, column]:.0f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        axis.set_xticks(range(len(lengths)), map(str, lengths))
        axis.set_yticks(range(len(nestings)), map(str, nestings))
        axis.set_xlabel("length (digits of operands)")
        axis.set_ylabel("nesting (operations)")
        axis.set_title(f"{what}, {'gain in points' if gain else '% right'}", fontsize=10)
        figure.colorbar(picture, ax=axis, pad=0.02)
    figure.suptitle(title, fontsize=11, parse_math=False)  # the name of a folder
    picture_file = io.BytesIO()
    figure.savefig(picture_file, dpi=150, format=path.suffix[1:].lower() or "png")
    replace_file(path, picture_file.getvalue())
    plt.close(figure)


def _mark(share: Share) -> str:
    return "•" if share.low > 0 or share.high < 0 else ""
