"""The figures of tools/bench as tables to read, and as a plot of TTFT over prompt length."""

from __future__ import annotations

import io
from collections.abc import Iterator

from tools.common import table

GB = 1e9


def report(result: dict) -> str:
    """All figures of a run as text."""
    parts = [_heading(result)]
    if "prefill" in result:
        parts += _prefill_tables(result)
    if "cold" in result:
        parts.append("lengths met for the first time, and again\n" + _numbers(_cold_rows(result["cold"])))
    if "slots" in result:
        parts.append(_slots(result["slots"]))
    if "memory" in result:
        parts.append("memory of a full prefill\n" + _numbers(_memory_rows(result["memory"])))
    if "compile" in result:
        parts.append(_compile(result["compile"]))
    return "\n\n".join(parts)


def _heading(result: dict) -> str:
    computer = result["machine"]
    layers = f"{result['layers']} layers"
    if result["layers"] < result["all_layers"]:
        layers += f" of {result['all_layers']}, as asked for, or as many as fit into memory"
    mode = "compiled" if result["compiled"] else "eager"
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = (
        f"model     {result['model']}, {result['weights']} weights, {layers}, {result['dtype']}, {mode}",
        f"machine   {computer['device']}, {computer['threads']} threads, torch {computer['torch']}, {versions}",
        f"runs      {result['runs']} rounds in turn: medians, lowest .. highest; ratios are taken round by round",
    )
    return "\n".join(lines)


def _prefill_tables(result: dict) -> Iterator[str]:
    lengths = result["prefill"]
    yield "prefill\n" + _numbers(_prefill_rows(lengths))
    yield "decode, and prefill without attention\n" + _numbers(_decode_rows(lengths))
    if result["image"]:
        width, height = result["image"]
        yield f"vision tower, an image of {width} x {height} pixels\n" + _numbers(_tower_rows(lengths))
    if any(figures["rivals"] for figures in lengths.values()):
        yield "pop's speed over the rivals'\n" + _numbers(_rival_rows(lengths))


def _compile(times: dict) -> str:
    if not times["cold"]["compiled"]:
        return "compile   nothing was compiled"
    cold = times["cold"]["seconds"]
    warm = times["warm"]["seconds"]
    return f"compile   {cold:.1f} s cold, {warm:.1f} s in a second process"


def plot(result: dict, kind: str) -> bytes:
    """TTFT over prompt length, a line for each plan and rival, as a file of `kind`, svg or png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    lengths = result["prefill"]
    first = next(iter(lengths.values()))
    lines = {"all layers": [row["ttft_s"] for row in lengths.values()]}
    for group in ("plans", "rivals"):
        for name in first[group]:
            lines[name] = [row[group][name]["ttft_s"] for row in lengths.values()]
    for name, times in lines.items():
        middles = [time["median"] for time in times]
        below = [time["median"] - time["low"] for time in times]
        above = [time["high"] - time["median"] for time in times]
        style = "--" if name in first["rivals"] else "-"
        axes.errorbar(list(lengths), middles, [below, above], fmt="o" + style, markersize=3, capsize=2, label=name)
    axes.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="time to first token, seconds")
    axes.set_xticks(list(lengths), [f"{tokens:,}" for tokens in lengths], minor=False)
    axes.set_title(f"{result['model']}, {result['layers']} layers, {result['dtype']}, {result['machine']['device']}")
    axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind)
    return drawn.getvalue()


def _prefill_rows(lengths: dict) -> Iterator[list[str]]:
    yield ["tokens", "prompt encoded by", "TTFT, ms", "lowest .. highest", "speedup", "limit", "efficiency", "MFU"]
    for tokens, full in lengths.items():
        yield [f"{tokens:,}", "all layers", *_ms(full["ttft_s"]), "", "", "", _percent(full["mfu"])]
        for name, row in full["plans"].items():
            label = f"{name}, without {row['layers']} layers"
            if row["rank"]:
                label += f", codes of {row['rank']}"
            speeds = [f"{row['speedup']['median']:.2f}x", f"{row['limit']:.2f}x", f"{row['efficiency']['median']:.3f}"]
            yield ["", label, *_ms(row["ttft_s"]), *speeds, ""]
        for name, row in full["rivals"].items():
            yield ["", name, *_ms(row["ttft_s"]), "", "", "", ""]


def _decode_rows(lengths: dict) -> Iterator[list[str]]:
    yield [
        "tokens",
        "tokens/s",
        "lowest .. highest",
        "MBU",
        "read, GB/s",
        "peak, TFLOP/s",
        "prefill, us/token",
        "flatness",
    ]
    for tokens, row in lengths.items():
        speed = row["decode_tokens_per_s"]
        yield [
            f"{tokens:,}",
            f"{speed['median']:.1f}",
            f"{speed['low']:.1f} .. {speed['high']:.1f}",
            _percent(row["mbu"]),
            f"{row['bandwidth_bytes_per_s']['median'] / GB:.1f}",
            f"{row['peak_flops_per_s']['median'] / 1e12:.3f}",
            f"{row['rest_per_token_s']['median'] * 1e6:.1f}",
            f"{row['flatness']['median']:.2f}",
        ]


def _cold_rows(lengths: dict) -> Iterator[list[str]]:
    yield ["tokens", "TTFT, ms", "again", "decode, ms a token", "again"]
    for tokens, row in lengths.items():
        times = [row[time][name] for name in ("ttft_s", "step_s") for time in ("first", "second")]
        yield [f"{tokens:,}", *(f"{seconds * 1e3:,.1f}" for seconds in times)]


def _rival_rows(lengths: dict) -> Iterator[list[str]]:
    plans = next(iter(lengths.values()))["plans"]
    yield ["tokens", "rival", "full", *plans, "decode", "its tokens/s"]
    for tokens, figures in lengths.items():
        for name, row in figures["rivals"].items():
            ratios = [row["full_speedup"], *row["pruned_speedup"].values(), row["decode_speedup"]]
            speeds = [f"{speed['median']:.2f}x" for speed in ratios]
            yield [f"{tokens:,}", name, *speeds, f"{1 / row['step_s']['median']:.1f}"]


def _tower_rows(lengths: dict) -> Iterator[list[str]]:
    yield ["tokens", "tower, ms", "lowest .. highest", "of TTFT", "of FLOPs", "share / share"]
    for tokens, figures in lengths.items():
        row = figures["tower"]
        shares = [_percent(row["share"]), f"{row['flops_share']:.1%}", f"{row['ratio']['median']:.2f}"]
        yield [f"{tokens:,}", *_ms(row["seconds"]), *shares]


def _memory_rows(lengths: dict) -> Iterator[list[str]]:
    yield ["tokens", "peak, GB", "formula, GB", "peak / formula"]
    for tokens, row in lengths.items():
        peak = row["peak_bytes"] / GB
        formula = row["formula_bytes"] / GB
        yield [f"{tokens:,}", f"{peak:.3f}", f"{formula:.3f}", f"{row['ratio']:.3f}"]


def _slots(row: dict) -> str:
    short, long = row["slots"]
    text = f"slots     decode at position {row['position']:,} with {long:,} slots against {short:,}: "
    if "left_out" in row:
        return text + row["left_out"]
    return text + f"{row['ratio']['median']:.3f} of the time"


def _numbers(rows) -> str:
    """A table whose cells align right, except for the names of plans and rivals."""
    rows = list(rows)
    names = [column for column, heading in enumerate(rows[0]) if heading in ("prompt encoded by", "rival")]
    return table(rows, names)


def _ms(times: dict) -> list[str]:
    return [f"{times['median'] * 1e3:,.1f}", f"{times['low'] * 1e3:,.1f} .. {times['high'] * 1e3:,.1f}"]


def _percent(values: dict) -> str:
    return f"{values['median']:.1%}"
