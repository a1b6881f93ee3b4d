"""The figures of tools/evaluate/__main__.py as a table to read and as a plot of the accuracy-speed frontier."""

from __future__ import annotations

import io
from collections.abc import Callable

from pop.errors import InputError
from pop.files import replaced
from tools.evaluate.tasks import DISTRACTORS


def report(result: dict) -> str:
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
        parts.append(f"{title}\n{_table(_text_rows(domain['rows'], ttft if number == 0 else {}))}")
    if ttft and "text" not in result:
        parts.append(_table([["", *_TTFT_HEADS], *([name, *_ttft_cells(row)] for name, row in ttft.items())]))
    if "generation" in result:
        rows = [["", "leading tokens equal", "answers equal"]]
        for name, row in result["generation"].items():
            rows.append([name, f"{row['leading']:.1%}", f"{row['exact']:.1%}"])
        count = next(iter(result["generation"].values()))["prompts"]
        parts.append(f"generation: greedy, {count} prompts, {counts['new']} tokens each\n{_table(rows)}")
    for task in ("needle", "documents"):
        if task in result:
            parts.append(_retrieval_report(task, result[task]))
    if "human-eval" in result:
        rows = [[name, f"{row['passed']} of {row['problems']}"] for name, row in result["human-eval"].items()]
        parts.append(f"human-eval: greedy, problems passed\n{_table(rows)}")
    return "\n\n".join(parts)


_TTFT_HEADS = ["TTFT ms", "speedup", "limit"]


def _ttft_cells(row: dict) -> list[str]:
    limit = "-" if row["limit"] is None else f"{row['limit']:.2f}x"
    return [f"{row['median_s'] * 1e3:,.0f}", f"{row['speedup']:.2f}x", limit]


def _text_rows(rows: dict[str, dict], ttft: dict[str, dict]) -> list[list[str]]:
    heads = ["", "perplexity", "change", "KL", "KL first", "same top", "first", *(_TTFT_HEADS if ttft else [])]
    table = [heads]
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
        table.append(cells + (_ttft_cells(ttft[name]) if ttft else []))
    return table


def _retrieval_report(task: str, rows: dict[str, dict]) -> str:
    groups = next(iter(rows.values()))
    heads = ["", *(f"{group} {what}" for group in groups for what in ("exact", "top", "rank"))]
    table = [heads]
    for name, row in rows.items():
        cells = [(f"{cell['exact']:.0%}", f"{cell['top']:.0%}", f"{cell['rank']:.1f}") for cell in row.values()]
        table.append([name, *(value for cell in cells for value in cell)])
    sizes = ", ".join(f"{group}: {cell['questions']}" for group, cell in groups.items())
    chance = 1 + DISTRACTORS
    return f"{task}: questions by prompt length ({sizes}); chance: top {1 / chance:.0%}, rank {(chance + 1) / 2}\n" + (
        _table(table)
    )


def _with_interval(figure: dict, show: Callable[[float], str]) -> str:
    if figure["low"] is None:
        return show(figure["value"])
    return f"{show(figure['value'])} [{show(figure['low'])}, {show(figure['high'])}]"


def _change(ratio: float) -> str:
    return f"{ratio:+.1%}" if ratio < 10 else f"x{_number(1 + ratio)}"


def _number(x: float) -> str:
    return f"{x:.2f}" if x < 1000 else f"{x:.1e}"


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def plot(result: dict, kind: str) -> bytes:
    """KL over measured speedup, a point a contender: the accuracy-speed frontier as a file of `kind`, svg or png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    domain, text = next(iter(result["text"].items()))
    for name, row in list(text["rows"].items())[1:]:
        speedup, kl = result["ttft"][name]["speedup"], row["kl"]
        axes.plot(speedup, kl["value"], "o", color="black", markersize=4)
        if kl["low"] is not None:
            axes.vlines(speedup, kl["low"], kl["high"], color="gray")
        axes.annotate(name, (speedup, kl["value"]), xytext=(5, 3), textcoords="offset points", fontsize=8)
    axes.axvline(1, color="gray", linewidth=0.8, linestyle="--")
    axes.set(yscale="log", xlabel="speedup of the time to first token, over the full model")
    axes.set_ylabel("KL(full || contender), nats a token")
    axes.set_title(f"{result['model']}, {result['dtype']}, {domain}: {text['windows']} windows", fontsize=10)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind)
    return drawn.getvalue()


def write_whole(path: str, data: bytes) -> None:
    """Write a file whole or not at all."""
    try:
        with replaced(path) as draft:
            draft.write_bytes(data)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another path") from None
