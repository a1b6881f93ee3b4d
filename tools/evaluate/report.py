"""The figures of tools/evaluate as tables to read, and as a plot of loss over speed."""

from __future__ import annotations

import io
from collections.abc import Callable

from tools.common import table


def report(result: dict) -> str:
    """All figures of a run as text."""
    computer = result["machine"]
    counts = result["tokens"]
    parts = [
        f"""\
model     {result["model"]}, {result["num_layers"]} layers, {result["dtype"]}, seed {result["seed"]}
machine   {computer["device"]}, {computer["threads"]} threads, torch {computer["torch"]}
windows   {counts["prompt"]} prompt + {counts["continuation"]} continuation tokens; \
intervals: 95 %, bootstrap over windows"""
    ]
    if {"text", "retrieval", "ttft"} & set(result):
        parts.append(table(summary_rows(result)))
    for name, domain in result.get("text", {}).items():
        title = f"{name}: {domain['windows']} windows, {domain['continuation_tokens']:,} continuation tokens"
        parts.append(f"{title}\n{table(_text_rows(domain['rows']))}")
    if "retrieval" in result:
        parts.append(_retrieval_report(result["retrieval"]))
    if "generation" in result:
        rows = [["", "leading tokens equal", "answers equal"]]
        for name, row in result["generation"].items():
            rows.append([name, f"{row['leading']:.1%}", f"{row['exact']:.1%}"])
        count = next(iter(result["generation"].values()))["prompts"]
        parts.append(f"generation: greedy, {count} prompts, {counts['new']} tokens each\n{table(rows)}")
    if "human-eval" in result:
        rows = [[name, f"{row['passed']} of {row['problems']}"] for name, row in result["human-eval"].items()]
        parts.append(f"human-eval: greedy, problems passed\n{table(rows)}")
    return "\n\n".join(parts)


def summary_rows(result: dict) -> list[list[str]]:
    """KL, retrieval and speed beside each other, of all domains and all questions."""
    text = next(iter(result.get("text", {}).values()), {"rows": {}})["rows"]
    retrieval = result.get("retrieval", {"rows": {}})["rows"]
    ttft = result.get("ttft", {})
    names = list(text or retrieval or ttft)
    lines = [[""], *([name] for name in names)]
    if text:
        lines[0] += _TEXT_HEADS[:2]
        for number, name in enumerate(names):
            lines[number + 1] += _text_cells(text[name], number)[:2]
    if retrieval:
        lines[0] += _RETRIEVAL_HEADS
        for number, name in enumerate(names):
            lines[number + 1] += _retrieval_cells(retrieval[name], retrieval[names[0]])
    if ttft:
        lines[0] += _TTFT_HEADS
        for number, name in enumerate(names):
            is_own = result.get("contenders", {}).get(name, {}).get("is_own", False)
            lines[number + 1] += _ttft_cells(ttft[name], number, is_own)
    return lines


_TTFT_HEADS = ["TTFT ms", "speedup", "limit"]
_TEXT_HEADS = ["perplexity", "KL", "same top", "KL first", "first"]
_RETRIEVAL_HEADS = ["retrieved", "of full", "lost", "gained", "nats an answer"]


def _ttft_cells(row: dict, number: int, is_own: bool) -> list[str]:
    """The speed of code that is written to be read says nothing about its method."""
    limit = "-" if row["limit"] is None else f"{row['limit']:.2f}x"
    speedup = f"{row['speedup']:.2f}x"
    if number and row.get("low") is not None:
        speedup += f" [{row['low']:.2f}, {row['high']:.2f}]"
    if is_own:
        speedup = "-"
    return [f"{row['median_s'] * 1e3:,.0f}", speedup, limit]


def _text_rows(rows: dict[str, dict]) -> list[list[str]]:
    lines = [["", *_TEXT_HEADS]]
    for number, (name, row) in enumerate(rows.items()):
        lines.append([name, *_text_cells(row, number)])
    return lines


def _text_cells(row: dict, number: int) -> list[str]:
    if number == 0:  # the full model
        return [_number(row["perplexity"]), *[""] * 4]
    return [
        _with_interval(row["perplexity_change"], _change),
        _with_interval(row["kl"], "{:.3f}".format),
        _with_interval(row["same"], "{:.1%}".format),
        f"{row['kl_first']['value']:.3f}",
        f"{row['same_first']['value']:.0%}",
    ]


def _retrieval_cells(row: dict, full: dict) -> list[str]:
    if row is full:
        return [f"{row['exact']:.0%}", "", "", "", f"{row['log_prob']:.2f}"]
    share = "-" if row["share"] is None else _with_interval(row["share"], "{:.0%}".format)
    pairs = list(zip(full["by_question"]["exact"], row["by_question"]["exact"], strict=True))
    lost = pairs.count((1, 0))  # exact answers of the full model, but not of this one
    gained = pairs.count((0, 1))
    return [f"{row['exact']:.0%}", share, f"{lost}", f"{gained}", _with_interval(row["difference"], "{:+.2f}".format)]


def _retrieval_report(retrieval: dict) -> str:
    """Exact answers and log-probabilities of each kind of question."""
    rows = retrieval["rows"]
    kinds = next(iter(rows.values()))["kinds"]
    lines = [["exact, nats an answer", *rows]]
    for kind, cell in kinds.items():
        line = [f"{kind} ({cell['questions']})"]
        for row in rows.values():
            found = row["kinds"][kind]
            line.append(f"{found['exact']:.0%} {found['log_prob']:6.1f}")
        lines.append(line)
    return f"retrieval: {retrieval['questions']} questions by kind and prompt length\n{table(lines)}"


def _with_interval(figure: dict, show: Callable[[float], str]) -> str:
    if figure["low"] is None:
        return show(figure["value"])
    return f"{show(figure['value'])} [{show(figure['low'])}, {show(figure['high'])}]"


def _change(ratio: float) -> str:
    return f"{ratio:+.1%}" if ratio < 10 else f"x{_number(1 + ratio)}"


def _number(x: float) -> str:
    return f"{x:.2f}" if x < 1000 else f"{x:.1e}"


def plot(result: dict, kind: str) -> bytes:
    """KL, and retrieval where it was measured, over speedup: a line for each method, a point for each contender.

    Args:
        result: the figures of a run with the tasks text and ttft.
        kind: svg or png. An SVG keeps its text as text and is the same for the same figures.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

    domain, text = next(iter(result["text"].items()))
    retrieval = result.get("retrieval", {"rows": {}})
    settings = {"font.size": 10, "font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": "pop"}
    with matplotlib.rc_context(settings):
        shares = {name: row["share"] for name, row in retrieval["rows"].items()}
        two = any(shares.values())
        figure = Figure(figsize=(7, 7.6 if two else 5), layout="constrained")
        panels = figure.subplots(1 + two, sharex=True, squeeze=False)[:, 0]
        _draw(panels[0], result, {name: row["kl"] for name, row in text["rows"].items()})
        panels[0].set(yscale="log", ylabel="KL(full || pruned), nats a token")
        panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panels[0].yaxis.set_major_formatter("{x:g}")
        panels[0].yaxis.set_minor_formatter(NullFormatter())
        if two:
            _draw(panels[1], result, shares)
            panels[1].set_ylabel(f"exact answers to {retrieval['questions']} questions,\nof the full model's")
            panels[1].yaxis.set_major_formatter(PercentFormatter(1))
        computer = result["machine"]
        speed = f"speedup of the time to first token,\non {computer['device']} with {computer['threads']} threads"
        panels[-1].set_xlabel(speed)
        where = f"{text['windows']} windows" + ("" if domain == "all" else f" of {domain}")
        prompt = result["tokens"]["prompt"]
        panels[0].set_title(
            f"{result['model']}, {result['num_layers']} layers, {result['dtype']}: {where} with {prompt:,} prompt "
            "tokens.\nNumbers at points: pruned layers. Further right is better, as is a lower KL.",
            fontsize=10,
        )
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", frameon=False)
        drawn = io.BytesIO()
        figure.savefig(drawn, format=kind, dpi=144, metadata={"Date": None} if kind == "svg" else None)
        return drawn.getvalue()


_COLOURS = ("#d1495b", "#00798c", "#2e4057", "#edae49", "#8d6a9f", "#66a182", "#888888", "#a0522d")
_MARKERS = "osD^vPX*<"  # one more than colours: pairs come back late


def _draw(axes, result: dict, values: dict[str, dict]) -> None:
    """Draw each contender's value over its speedup, but not the full model's.

    A contender that reads prompts in its own way is drawn at its limit, if that is known: its code is written to be
    read, and not to be fast.
    """
    lines = {}
    for name in list(values)[1:]:
        contender = result["contenders"][name]
        times = result["ttft"][name]
        speedup = times["limit"] if contender.get("is_own") else times["speedup"]
        if speedup is None:
            continue
        point = (speedup, values[name], contender["pruned_layers"])
        label = f"{contender['method']} (at its limit)" if contender.get("is_own") else contender["method"]
        lines.setdefault(label, []).append(point)
    for number, (method, points) in enumerate(lines.items()):
        _draw_line(axes, method, sorted(points, key=lambda point: point[0]), number)
    axes.axvline(1, color="gray", linewidth=0.8, linestyle="--")
    axes.grid(True, alpha=0.25)


def _draw_line(axes, method: str, points: list[tuple], number: int) -> None:
    """Join one method's points (speedup, value, pruned layers), and draw each one's interval and number of layers."""
    colour = _COLOURS[number % len(_COLOURS)]
    marker = _MARKERS[number % len(_MARKERS)]
    speedups = [speedup for speedup, _, _ in points]
    heights = [figure["value"] for _, figure, _ in points]
    axes.plot(speedups, heights, marker=marker, color=colour, markersize=6, linewidth=1.5, label=method)
    for speedup, figure, layers in points:
        if figure["low"] is not None:
            axes.vlines(speedup, figure["low"], figure["high"], color=colour, alpha=0.5)
        if layers:
            place = {"xytext": (-5, 5), "textcoords": "offset points", "horizontalalignment": "right"}
            axes.annotate(str(layers), (speedup, figure["value"]), color=colour, **place)
