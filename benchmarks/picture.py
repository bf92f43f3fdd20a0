"""Makes the picture of the README: one question about the sample scan, its answer, and what is shown with it.

    python -m benchmarks.picture --to docs/images/answer.png

Slices with the region that the answer rests on, the answer with its confidence and without the scan, and the routing:
all of the embedded reader and `python -m tghmoe_jax.drawn.sample`.
"""

import argparse
import tempfile
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import tghmoe_jax
from tghmoe_jax.drawn import sample
from tghmoe_jax.evaluation import evidence_plot, routing_plot
from tghmoe_jax.reader.answer import Answer

QUESTION, CHOICES = "Which organ is abnormal?", ("spleen", "kidney", "colon", "liver")
GREY, RED = "#555555", "#c62828"


def ask() -> Answer:
    """The embedded reader's answer about the sample scan."""
    with tempfile.TemporaryDirectory() as folder:
        scan = f"{folder}/sample.nii.gz"
        sample.main(["--to", scan])
        return tghmoe_jax.load().ask(scan, QUESTION, CHOICES, evidence=True, allow_out_of_domain=True)


def draw(answer: Answer) -> Figure:
    """Slices above, what was said beside them, expert of each patch below."""
    evidence, routing = answer.evidence, answer.routing
    slabs = evidence.slabs
    figure = Figure(figsize=(11, 5.9), facecolor="white")
    grid = figure.add_gridspec(
        2, len(slabs) + 1, width_ratios=[1.0] * len(slabs) + [1.6], left=0.01, right=0.985, top=0.88, bottom=0.09,
        wspace=0.04, hspace=0.24,
    )  # fmt: skip
    strongest = max(slabs, key=lambda slab: slab.strength)
    low, high = evidence_plot.GREY[evidence.volume.unit]
    layer, size = 0, answer.scan.slices()[0].shape[1]
    colours = routing_plot._colours(routing.load.shape[1])
    for column, slab in enumerate(slabs):
        first, last = slab.voxels[0]
        middle = (first + last) // 2
        image = evidence.volume.array[middle - 1]
        for row in (0, 1):
            axis = figure.add_subplot(grid[row, column])
            axis.imshow(image, cmap="gray", vmin=low, vmax=high)
            axis.set_xticks([]), axis.set_yticks([])
            if row:
                patches = colours[routing.winner[layer, column]]
                axis.imshow(patches, extent=(-0.5, size - 0.5, size - 0.5, -0.5), alpha=0.45, interpolation="nearest")
                continue
            axis.set_title(f"slices {first}–{last}: {max(0, round(100 * slab.share))} %", fontsize=11)
            for x, letter in ((0.06, "R"), (0.94, "L")):
                axis.text(x, 0.5, letter, color="yellow", fontsize=11, ha="center", transform=axis.transAxes)
            if slab is strongest:
                (top, bottom), (left, right) = evidence.regions[0].edges[1:] - 0.5
                axis.add_patch(
                    Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=RED, linewidth=3)
                )
    figure.text(
        0.012,
        0.945,
        "Evidence: how far the answer's likelihood falls when a part is hidden (100 %: all is hidden)",
        fontsize=12,
    )
    below = f"Routing: which expert worked on each patch (layer {routing.layers[layer]}, first choice)"
    figure.text(0.012, 0.452, below, fontsize=12)
    axis = figure.add_axes((0.74, 0.125, 0.22, 0.24))
    axis.bar(range(len(colours)), routing.load[layer], color=colours)
    axis.set_title(f"share of each expert, {routing.task} group", fontsize=11)
    axis.set_xticks(range(len(colours))), axis.set_yticks([])
    axis.spines[["top", "right", "left"]].set_visible(False)
    say(figure, answer)
    return figure


def say(figure: Figure, answer: Answer) -> None:
    """Question, choices, answer, confidence and the answer without the scan, beside the slices."""
    lines = (
        ("Question", QUESTION, "black", "bold"),
        ("", ", ".join(CHOICES) + "?", "black", "normal"),
        ("Answer", answer.text, "#1b5e20", "bold"),
        ("Confidence", f"{answer.confidence.value:.3f}", "black", "normal"),
        ("", f"{answer.confidence.right} of {answer.confidence.items} such answers were right", GREY, "normal"),
        ("Without the scan", answer.blind_text, RED, "bold"),
    )
    height = 0.90
    for label, text, colour, weight in lines:
        if label:
            height -= 0.012
            figure.text(0.715, height, label, fontsize=10.5, color=GREY, va="top")
            height -= 0.036
        figure.text(0.715, height, text, fontsize=12, color=colour, weight=weight, va="top")
        height -= 0.042
    figure.text(0.012, 0.025, "A drawn scan, not a patient. Not for clinical use.", fontsize=10.5, color=GREY)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.picture", description=__doc__.split("\n")[0])
    parser.add_argument("--to", type=Path, default=Path("docs/images/answer.png"), metavar="PNG")
    file = parser.parse_args().to
    file.parent.mkdir(parents=True, exist_ok=True)
    routing_plot.write(file, draw(ask()), f"{evidence_plot.CAPTION} {routing_plot.CAPTION}")
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
