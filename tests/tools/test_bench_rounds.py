"""Rounds, and the figures that tools/bench makes of given times; other libraries as stand-ins."""

import sys
import types
from unittest.mock import Mock, call

import pytest
import torch
from support.tiny import tiny_config, tiny_model

import pop
from pop.pruning import cost
from tools.bench import __main__ as bench
from tools.bench import measure, rivals, rounds, shapes
from tools.common import timed


@pytest.fixture
def model():
    return tiny_model(tiny_config(), compile=False)


def test_rounds_alternate_and_the_first_is_not_recorded():
    order = []

    def turn(name):
        order.append(name)
        return {"s": len(order)}

    turns = {(4, name): lambda name=name: turn(name) for name in "abc"}
    record = rounds.run_rounds(turns, 2, "test")
    assert "".join(order) == "abc" + "cba" + "abc"
    assert record == {(4, "a", "s"): [6, 7], (4, "b", "s"): [5, 8], (4, "c", "s"): [4, 9]}


def test_figures_follow_from_the_times(model, monkeypatch):
    """Times, peak and bandwidth as given, one round slower than the others by a factor: every figure by hand."""

    def turn(calls=1, **figures):
        """It is called so many times in each of the four rounds, of which the first is not timed."""
        slower = iter([factor for factor in (1.0, 4.0, 1.0, 2.0) for _ in range(calls)])

        def figures_of_this_round():
            factor = next(slower)
            return {name: value / factor if "per_s" in name else value * factor for name, value in figures.items()}

        return figures_of_this_round

    def pop_turn(model, prompt, cache, plan, steps, images):
        return turn(ttft_s=(3.0 if plan.layers else 4.0) * len(prompt), step_s=0.1)

    monkeypatch.setattr(measure, "pop_turn", pop_turn)
    monkeypatch.setattr(measure, "peak_turn", lambda *_: turn(calls=2, flops_per_s=1e9))  # for both lengths
    monkeypatch.setattr(measure, "bandwidth_turn", lambda *_: turn(calls=2, bytes_per_s=1e6))
    monkeypatch.setattr(measure, "attention_turn", lambda _, n: turn(attention_s=n * n / 100))
    slower = lambda prompt, _: turn(ttft_s=6.0 * len(prompt), step_s=0.3)  # noqa: E731
    rival = types.SimpleNamespace(name="rival", turn=slower)
    plan, none = pop.PrunePlan((3, 4)), pop.PrunePlan.none()
    args = bench.parser().parse_args(["--lengths", "10,20", "--runs", "3", "--decode-steps", "3"])
    bench.check(args)
    result = measure.measure_prefill(model, {"p": plan}, [rival], args)
    for N, figures in result.items():
        flops = cost.prefill_flops(model.config, N, none)
        limit = flops / cost.prefill_flops(model.config, N, plan)
        mfu = flops / (4.0 * N * 1e9)
        mbu = shapes.decode_bytes(model.config, N + 2, torch.float32) / (0.1 * 1e6)  # N+1, N+2, N+3 slots
        row, against = figures["plans"]["p"], figures["rivals"]["rival"]
        assert figures["ttft_s"] == {"median": 8.0 * N, "low": 4.0 * N, "high": 16.0 * N}
        assert row["speedup"] == pytest.approx({"median": 4 / 3, "low": 4 / 3, "high": 4 / 3})
        assert row["limit"] == pytest.approx(limit)
        assert row["efficiency"]["high"] == pytest.approx(4 / 3 / limit)
        assert figures["mfu"] == pytest.approx({"median": mfu, "low": mfu, "high": mfu})
        assert figures["mbu"]["low"] == pytest.approx(mbu)
        assert figures["decode_tokens_per_s"] == pytest.approx({"median": 5.0, "low": 2.5, "high": 10.0})
        assert figures["flatness"]["median"] == pytest.approx((4 - N / 100) / (4 - 10 / 100))
        assert against["full_speedup"]["high"] == pytest.approx(1.5)
        assert against["pruned_speedup"]["p"]["low"] == pytest.approx(2)
        assert against["decode_speedup"]["median"] == pytest.approx(3)


def test_the_clock_times_the_first_token_and_each_step_apart(monkeypatch):
    """A prefill takes 5 seconds, and a step as many as the number of the token that it reads."""
    now = [0.0]

    def spend(seconds: float, token: int) -> int:
        now[0] += seconds
        return token

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert timed(lambda: spend(5, 2), lambda token: spend(token, token + 1), 3) == (5.0, [2.0, 3.0, 4.0])


def test_slots_start_from_the_same_position_in_both_caches(model, notes):
    seen = notes(model, "decode", lambda tokens, cache: (cache.max_seq_len, int(cache.lengths[0])))
    result = measure.measure_slots(model, 5, 2, 1)
    short, long = ([(slots, 5), (slots, 6)] for slots in (2048, 32768))
    assert seen == short + long + long + short
    assert (result["slots"], result["position"]) == ([2048, 32768], 5)
    assert result["ratio"]["median"] == result["step_s"][1]["median"] / result["step_s"][0]["median"]


# ---- Rivals ----


def test_llama_cpp_reads_the_prompt_and_then_its_own_tokens(model, monkeypatch, tmp_path):
    llama_cpp = Mock()
    llama = llama_cpp.Llama.return_value
    llama.sample.side_effect = [3, 4, 5]
    monkeypatch.setitem(sys.modules, "llama_cpp", llama_cpp)
    path = tmp_path / "m.gguf"
    path.touch()
    (rival,) = rivals.llama_cpp(model, None, str(path))
    assert rival.turn([7, 8, 9], 2)().keys() == {"ttft_s", "step_s"}
    made = llama_cpp.Llama.call_args
    assert (made.args, made.kwargs["n_ctx"], made.kwargs["n_threads"]) == ((str(path),), 6, torch.get_num_threads())
    assert [one.args for one in llama.eval.call_args_list] == [([7, 8, 9],), ([3],), ([4],)]
    assert llama.method_calls[0] == call.reset()
    assert {one.kwargs["temp"] for one in llama.sample.call_args_list} == {0}
    with pytest.raises(pop.InputError, match="needs --gguf"):
        rivals.llama_cpp(model, None, None)
