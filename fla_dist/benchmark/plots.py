"""Plots of benchmarks, where matplotlib is installed (the extra `plots`)."""

from __future__ import annotations

from pathlib import Path


def plot_efficiency(lines: dict[str, list[tuple[int, float]]], title: str, path: Path) -> None:
    """Writes a PNG of (ranks, efficiency) points, one line a name; says so where it cannot."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print(f"{path} left out: matplotlib is not installed (pip install 'fla-dist[plots]')")
        return
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, points in lines.items():
        ranks, efficiencies = zip(*sorted(points), strict=True)
        axes.plot(ranks, [100 * efficiency for efficiency in efficiencies], marker="o", label=name)
    axes.set(xlabel="ranks", ylabel="tokens/s/GPU over those of the fewest ranks, %", title=title)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
