"""Draw the scores that `pop importance --out` has saved: python -m tools.plot_importance scores.json layers.svg

Both stages' scores are drawn over the layers, with standard errors, on a logarithmic axis. A triangle on the lower edge
stands for a score of exactly zero. Needs matplotlib.
"""

import argparse
import io

import numpy as np
import torch

import pop
from pop.system import files
from tools.common import check_plot, exit_status

STYLES = {"prefill": ("tab:blue", "o"), "decode": ("tab:orange", "s")}  # color and marker


def plot(scores: pop.Importance, path: str) -> None:
    """Draw scores into an SVG or PNG file.

    Raises:
        InputError: The path ends otherwise, or cannot be written.
        MissingExtra: matplotlib is not installed.
    """
    kind = check_plot(path)
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", {"svg.hashsalt": "pop"}]):  # equal scores give equal files
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        _draw(scores, figure.add_subplot())
        drawn = io.BytesIO()
        figure.savefig(drawn, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    files.write_whole(path, drawn.getvalue(), "the plot", pop.InputError)


def _draw(scores: pop.Importance, axes) -> None:
    layers = np.arange(len(scores.prefill))
    for stage, (color, marker) in STYLES.items():
        values = getattr(scores, stage).numpy()
        errors = getattr(scores, f"{stage}_error").numpy()
        shown = np.where(values > 0, values, np.nan)
        zeros = layers[values == 0]
        style = {"color": color, "ms": 4}
        axes.errorbar(layers, shown, errors, marker=marker, lw=1, capsize=2, label=stage, **style)
        axes.plot(zeros, np.full(len(zeros), 0.03), "v", transform=axes.get_xaxis_transform(), **style)
    axes.set_yscale("log", nonpositive="clip")
    values = torch.cat((scores.prefill, scores.decode))
    positive = values[values > 0].tolist()
    if positive:
        axes.set_ylim(min(positive) / 3, max(positive) * 3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="layer", ylabel="importance, nats²")
    axes.set_title(f"Virtual gates: mean of {scores.num_samples} samples, with standard errors", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scores", help="a file of `pop importance --out`")
    parser.add_argument("out", help="the .svg or .png file to write")
    args = parser.parse_args(argv)
    return exit_status("plot_importance", lambda: plot(pop.Importance.load(args.scores), args.out))


if __name__ == "__main__":
    raise SystemExit(main())
