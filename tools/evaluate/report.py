"""The figures of tools/evaluate as tables to read, and as a plot of loss over speed."""

from __future__ import annotations

import io
from collections.abc import Callable

from tools.common import table
from tools.evaluate.tasks import DISTRACTORS


def report(result: dict) -> str:
    """All figures of a run as text."""
    computer, counts = result["machine"], result["tokens"]
    parts = [
        f"""\
model     {result["model"]}, {result["num_layers"]} layers, {result["dtype"]}, seed {result["seed"]}
machine   {computer["device"]}, {computer["threads"]} threads, torch {computer["torch"]}
windows   {counts["prompt"]} prompt + {counts["continuation"]} continuation tokens; \
intervals: 95 %, bootstrap over windows"""
    ]
    ttft = result.get("ttft", {})
    for number, (name, domain) in enumerate(result.get("text", {}).items()):
        title = f"{name}: {domain['windows']} windows, {domain['continuation_tokens']:,} continuation tokens"
        parts.append(f"{title}\n{table(_text_rows(domain['rows'], ttft if number == 0 else {}))}")
    if ttft and "text" not in result:
        parts.append(table([["", *_TTFT_HEADS], *([name, *_ttft_cells(row)] for name, row in ttft.items())]))
    if "generation" in result:
        rows = [["", "leading tokens equal", "answers equal"]]
        for name, row in result["generation"].items():
            rows.append([name, f"{row['leading']:.1%}", f"{row['exact']:.1%}"])
        count = next(iter(result["generation"].values()))["prompts"]
        parts.append(f"generation: greedy, {count} prompts, {counts['new']} tokens each\n{table(rows)}")
    for task in ("needle", "documents"):
        if task in result:
            parts.append(_retrieval_report(task, result[task]))
    if "human-eval" in result:
        rows = [[name, f"{row['passed']} of {row['problems']}"] for name, row in result["human-eval"].items()]
        parts.append(f"human-eval: greedy, problems passed\n{table(rows)}")
    return "\n\n".join(parts)


_TTFT_HEADS = ["TTFT ms", "speedup", "limit"]


def _ttft_cells(row: dict) -> list[str]:
    limit = "-" if row["limit"] is None else f"{row['limit']:.2f}x"
    return [f"{row['median_s'] * 1e3:,.0f}", f"{row['speedup']:.2f}x", limit]


def _text_rows(rows: dict[str, dict], ttft: dict[str, dict]) -> list[list[str]]:
    heads = ["", "perplexity", "change", "KL", "KL first", "same top", "first", *(_TTFT_HEADS if ttft else [])]
    lines = [heads]
    for number, (name, row) in enumerate(rows.items()):
        cells = [name, _number(row["perplexity"])]
        if number == 0:
            cells += [""] * 5
        else:
            cells += [
                _with_interval(row["perplexity_change"], _change),
                _with_interval(row["kl"], "{:.3f}".format),
                f"{row['kl_first']['value']:.3f}",
                _with_interval(row["same"], "{:.1%}".format),
                f"{row['same_first']['value']:.0%}",
            ]
        lines.append(cells + (_ttft_cells(ttft[name]) if ttft else []))
    return lines


def _retrieval_report(task: str, rows: dict[str, dict]) -> str:
    groups = next(iter(rows.values()))
    heads = ["", *(f"{group} {what}" for group in groups for what in ("exact", "top", "rank"))]
    lines = [heads]
    for name, row in rows.items():
        cells = [(f"{cell['exact']:.0%}", f"{cell['top']:.0%}", f"{cell['rank']:.1f}") for cell in row.values()]
        lines.append([name, *(value for cell in cells for value in cell)])
    sizes = ", ".join(f"{group}: {cell['questions']}" for group, cell in groups.items())
    chance = 1 + DISTRACTORS
    return f"{task}: questions by prompt length ({sizes}); chance: top {1 / chance:.0%}, rank {(chance + 1) / 2}\n" + (
        table(lines)
    )


def _with_interval(figure: dict, show: Callable[[float], str]) -> str:
    if figure["low"] is None:
        return show(figure["value"])
    return f"{show(figure['value'])} [{show(figure['low'])}, {show(figure['high'])}]"


def _change(ratio: float) -> str:
    return f"{ratio:+.1%}" if ratio < 10 else f"x{_number(1 + ratio)}"


def _number(x: float) -> str:
    return f"{x:.2f}" if x < 1000 else f"{x:.1e}"


def plot(result: dict, kind: str) -> bytes:
    """KL over speedup, both measured: a line for each method, a point with its 95 % interval for each contender.

    Args:
        result: the figures of a run with the tasks text and ttft.
        kind: svg or png. An SVG keeps its text as text and is the same for the same figures.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    domain, text = next(iter(result["text"].items()))
    lines = {}
    for name, row in list(text["rows"].items())[1:]:
        contender = result["contenders"][name]
        point = (result["ttft"][name]["speedup"], row["kl"], contender["pruned_layers"])
        lines.setdefault(contender["method"], []).append(point)
    settings = {"font.size": 10, "font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": "pop"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(7, 4.6), layout="constrained")
        axes = figure.add_subplot()
        for number, (method, points) in enumerate(lines.items()):
            _draw_line(axes, method, sorted(points, key=lambda point: point[0]), number)
        axes.axvline(1, color="gray", linewidth=0.8, linestyle="--")
        computer = result["machine"]
        speed = f"speedup of the time to first token, on {computer['device']} with {computer['threads']} threads"
        axes.set(yscale="log", xlabel=speed)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel("KL(full || pruned), nats a token")
        axes.grid(True, alpha=0.25)
        where = f"{text['windows']} windows" + ("" if domain == "all" else f" of {domain}")
        prompt = result["tokens"]["prompt"]
        axes.set_title(
            f"{result['model']}, {result['num_layers']} layers, {result['dtype']}: {where} with {prompt:,} prompt "
            "tokens.\nNumbers at points: pruned layers. Lower and further right is better.",
            fontsize=10,
        )
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        drawn = io.BytesIO()
        figure.savefig(drawn, format=kind, dpi=144, metadata={"Date": None} if kind == "svg" else None)
        return drawn.getvalue()


_COLOURS = ("#d1495b", "#00798c", "#2e4057", "#edae49", "#8d6a9f", "#66a182", "#888888")
_MARKERS = "osD^vPX"


def _draw_line(axes, method: str, points: list[tuple], number: int) -> None:
    """Join one method's points (speedup, KL, pruned layers), and draw each one's interval and number of layers."""
    colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
    speedups, losses = [speedup for speedup, _, _ in points], [kl["value"] for _, kl, _ in points]
    axes.plot(speedups, losses, marker=marker, color=colour, markersize=6, linewidth=1.5, label=method)
    for speedup, kl, layers in points:
        if kl["low"] is not None:
            axes.vlines(speedup, kl["low"], kl["high"], color=colour, alpha=0.5)
        if layers:
            place = {"xytext": (-5, 5), "textcoords": "offset points", "horizontalalignment": "right"}
            axes.annotate(str(layers), (speedup, kl["value"]), color=colour, **place)
