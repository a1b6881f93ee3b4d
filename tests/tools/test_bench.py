"""tools/bench/__main__.py: figures from given times, formulas against closed forms, turns in turn, and the command line."""

import dataclasses
import itertools
import json
import re
import sys
import types
from pathlib import Path

import matplotlib
import pytest
import torch
from support.tiny import hf_config, random_model, tiny_config, tiny_gemma3_config, write_checkpoint

import pop
from pop.checkpoints import registry
from pop.checkpoints.config_json import read_config
from pop.models.config import SiglipConfig
from pop.pruning import cost
from tools.bench import __main__ as bench
from tools.bench import rivals as bench_rivals
from tools.bench import shapes as bench_shapes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def model():
    config = tiny_config()
    return pop.Model(random_model(config), config, compile=False)


def arguments(*argv):
    args = bench._parser().parse_args(list(argv))
    bench.check(args)
    return args


# ---- Closed forms ----


@pytest.mark.parametrize("name", bench_shapes.SHAPES)
def test_known_shapes_have_the_registrys_parameters(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(bench_shapes.SHAPES[name]))
    config = read_config(tmp_path)
    assert config.dtype == torch.bfloat16
    if name == "gemma3-12b":  # the language model alone: it has the registry's with its vision tower
        config = dataclasses.replace(config, vision=SiglipConfig(1152, 4304, 27, 16, image_size=896, patch_size=14))
    assert bench_shapes.weight_bytes(config, torch.bfloat16) == 2 * registry.MODELS[name].parameters


@pytest.mark.parametrize("tied", [False, True])
def test_decode_reads_all_weights_but_an_untied_embedding(tied):
    """V 67, D 30, I 44, L 5, H 6, K 2, E 10, counted by hand."""
    config = tiny_config(tie_embeddings=tied)
    layer = 30 * 60 + 2 * 30 * 20 + 60 * 30 + 3 * 30 * 44 + 2 * 30  # q, k and v, o, MLP, norms
    read = 5 * layer + 30 + 67 * 30 + (0 if tied else 30)  # ..., last norm, head, the token's row of the embedding
    cache = 5 * 2 * 9 * 20
    assert bench_shapes.decode_bytes(config, 9, torch.float32) == 4 * (read + cache)
    assert bench_shapes.decode_bytes(config, 9, torch.bfloat16) == 2 * (read + cache)


def test_prefill_memory_by_hand(monkeypatch):
    config = tiny_config()
    weights = bench_shapes.weight_bytes(config, torch.bfloat16)
    cache = lambda tokens: 2 * 5 * (2 * (tokens + 1) * 20 + 30)  # noqa: E731
    everywhere = 7 * (3 * 30 + 2 * 60) * 2  # h, h + update, norm; q, attended
    mlp = 7 * 3 * 44 * 2
    assert bench_shapes.prefill_memory(config, 7, torch.bfloat16) == weights + cache(7) + everywhere + mlp
    mlp += 4 * (30 * 44 + 7 * (30 + 44))
    assert bench_shapes.prefill_memory(config, 7, torch.bfloat16, True) == weights + cache(7) + everywhere + mlp
    monkeypatch.setattr(bench_shapes, "CHUNK", 7)
    attention = 7 * 2 * 20 * 2 + 7 * 200 * (1 + 2)  # k, v; the mask, in one and in two bytes
    assert bench_shapes.prefill_memory(config, 200, torch.bfloat16) == weights + cache(200) + everywhere + attention


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured under Linux")
def test_memory_is_what_the_formula_says(tmp_path):
    """A prefill of 1,500 tokens, half of its memory activations, in a process of its own."""
    config = tiny_config(
        hidden_size=512, intermediate_size=2048, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=64,
        max_positions=4096, dtype=torch.float32,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(hf_config(config)))
    argv = ["--shape", str(tmp_path), "--lengths", "1500", "--compile", "false", "--device", "cpu"]
    found = bench.in_child("memory", argv, str(tmp_path))
    assert found["formula_bytes"] == bench_shapes.prefill_memory(config, 1500, torch.float32)
    assert found["ratio"] == pytest.approx(1, abs=0.1)


def test_windows_in_bytes_by_hand(monkeypatch):
    config = tiny_gemma3_config(windows=(5, 5, None))
    of_layer = 2 * 2 * 10 * 2  # a slot's bytes
    read = bench_shapes.weight_bytes(config, torch.bfloat16)
    assert bench_shapes.decode_bytes(config, 9, torch.bfloat16) == read + (5 + 5 + 9) * of_layer
    assert bench_shapes.decode_bytes(config, 4, torch.bfloat16) == read + 3 * 4 * of_layer
    monkeypatch.setattr(bench_shapes, "CHUNK", 70)
    for tokens, chunk, masks, in_order, block in (
        (4, 4, 0, 0, 0),
        (30, 30, 30 * 30, 0, 30 * 30),  # the window's alone
        (200, 70, 70 * (74 + 200), 74, 70 * 200),
    ):
        cache = bench_shapes.KVCache.size_in_bytes(config, 1, tokens, torch.bfloat16)
        attention = ((chunk + in_order) * 2 * 20 + block) * 2
        more = masks + max(attention, chunk * 3 * 44 * 2)
        expected = read + cache + chunk * (3 * 30 + 2 * 60) * 2 + more
        assert bench_shapes.prefill_memory(config, tokens, torch.bfloat16) == expected


@pytest.mark.parametrize("config", [tiny_config(num_layers=9), tiny_gemma3_config(windows=(5, None) * 4 + (5,))])
def test_as_many_layers_as_fit(config):
    def needed(layers):
        shorter = bench_shapes.shortened(config, layers)
        assert shorter.windows == config.windows[:layers]
        prefill = bench_shapes.prefill_memory(shorter, 20, torch.float32, True)
        return prefill + layers * 2 * 20 * 60 * 4 + bench_shapes.BIG  # projections of two taps

    assert bench_shapes.fitting_layers(config, 20, torch.float32, 10**12) == 9
    for layers in (1, 4, 8):
        free = needed(layers) / 0.9
        assert bench_shapes.fitting_layers(config, 20, torch.float32, free + 1) == layers
    with pytest.raises(pop.InputError, match=f"one layer of .* needs {needed(1):,} bytes"):
        bench_shapes.fitting_layers(config, 20, torch.float32, needed(1) / 0.9 - 1)


# ---- Rounds ----


def test_rounds_alternate_and_the_first_is_not_recorded():
    order = []

    def turn(name):
        order.append(name)
        return {"s": len(order)}

    turns = {(4, name): lambda name=name: turn(name) for name in "abc"}
    record = bench.run_rounds(turns, 2, "test")
    assert "".join(order) == "abc" + "cba" + "abc"
    assert record == {(4, "a", "s"): [6, 7], (4, "b", "s"): [5, 8], (4, "c", "s"): [4, 9]}


def test_a_ratio_is_taken_round_by_round():
    """Of the machine's three speeds 1, 5 and 2, each hits both variants, and the ratios are 2, 2 and 3."""
    assert bench.ratio([2.0, 10.0, 6.0], [1.0, 5.0, 2.0]) == {"median": 2.0, "low": 2.0, "high": 3.0}
    assert bench.ratio([2.0, 10.0, 6.0], [1.0, 5.0, 2.0], 0.5)["high"] == 1.5


def test_figures_follow_from_the_times(model, monkeypatch):
    """Times, peak and bandwidth as given, one round slower than the others by a factor: every figure by hand."""
    factors = [1.0, 4.0, 1.0, 2.0]  # how much slower each of the four rounds is, the first untimed
    now = {"factor": None}

    def time_run(model, prompt, cache, plan, steps, images):
        base = 3.0 if plan.layers else 4.0
        return base * len(prompt) * now["factor"], [0.1 * now["factor"]] * steps

    def run_rounds(turns, runs, what):
        count = itertools.count()

        def slowed(turn):
            def run():
                now["factor"] = factors[next(count) // len(turns)]
                return turn()

            return run

        return original({key: slowed(turn) for key, turn in turns.items()}, runs, what)

    original = bench.run_rounds
    monkeypatch.setattr(bench, "run_rounds", run_rounds)
    monkeypatch.setattr(bench, "time_run", time_run)
    monkeypatch.setattr(bench, "peak_turn", lambda *_: lambda: {"flops_per_s": 1e9 / now["factor"]})
    monkeypatch.setattr(bench, "bandwidth_turn", lambda *_: lambda: {"bytes_per_s": 1e6 / now["factor"]})
    attention = lambda _, n: lambda: {"attention_s": now["factor"] * n * n / 100}  # noqa: E731
    monkeypatch.setattr(bench, "attention_turn", attention)
    slower = lambda prompt, _: lambda: {"ttft_s": 6.0 * len(prompt) * now["factor"], "step_s": 0.3 * now["factor"]}  # noqa: E731
    rival = types.SimpleNamespace(name="rival", turn=slower)
    plan = pop.PrunePlan((3, 4))
    args = arguments("--lengths", "10,20", "--runs", "3", "--decode-steps", "3")
    result = bench.measure_prefill(model, {"p": plan}, [rival], args)
    config = model.config
    for N, figures in result.items():
        assert figures["ttft_s"] == {"median": 8.0 * N, "low": 4.0 * N, "high": 16.0 * N}
        limit = cost.prefill_flops(config, N, pop.PrunePlan.none()) / cost.prefill_flops(config, N, plan)
        row = figures["plans"]["p"]
        assert row["speedup"] == pytest.approx({"median": 4 / 3, "low": 4 / 3, "high": 4 / 3})
        assert row["limit"] == pytest.approx(limit)
        assert row["efficiency"]["high"] == pytest.approx(4 / 3 / limit)
        mfu = cost.prefill_flops(config, N, pop.PrunePlan.none()) / (4.0 * N * 1e9)
        assert figures["mfu"] == pytest.approx({"median": mfu, "low": mfu, "high": mfu})
        mbu = bench_shapes.decode_bytes(config, N + 2, torch.float32) / (0.1 * 1e6)  # steps read N+1, N+2, N+3 slots
        assert figures["mbu"]["low"] == pytest.approx(mbu)
        assert figures["decode_tokens_per_s"] == pytest.approx({"median": 5.0, "low": 2.5, "high": 10.0})
        assert figures["flatness"]["median"] == pytest.approx((4 - N / 100) / (4 - 10 / 100))
        against = figures["rivals"]["rival"]
        assert against["full_speedup"]["high"] == pytest.approx(1.5)
        assert against["pruned_speedup"]["p"]["low"] == pytest.approx(2)
        assert against["decode_speedup"]["median"] == pytest.approx(3)


def test_slots_start_from_the_same_position_in_both_caches(model, monkeypatch):
    seen = []
    decode = model.decode

    def watched(tokens, cache):
        seen.append((cache.max_seq_len, int(cache.lengths[0])))
        return decode(tokens, cache)

    monkeypatch.setattr(model, "decode", watched)
    result = bench.measure_slots(model, 5, 2, 1)
    short, long = ([(slots, 5), (slots, 6)] for slots in (2048, 32768))
    assert seen == short + long + long + short
    assert (result["slots"], result["position"]) == ([2048, 32768], 5)
    assert result["ratio"]["median"] == result["step_s"][1]["median"] / result["step_s"][0]["median"]

    class TooLarge(bench.KVCache):
        def __init__(self, config, rows, slots, **options):
            if slots > 2048:
                raise pop.CacheMemoryError("too large")
            super().__init__(config, rows, slots, **options)

    monkeypatch.setattr(bench, "KVCache", TooLarge)
    assert bench.measure_slots(model, 5, 2, 1)["left_out"] == "too large"


def test_attention_is_the_full_prefills(monkeypatch):
    """Local, global: the first chunk causal if the window does not cut it, later ones over what can be seen."""
    config, calls = tiny_gemma3_config(windows=(3, 5, None)), []
    model = pop.Model(random_model(config), config, compile=False)
    monkeypatch.setattr(bench, "CHUNK", 4)

    def causal(q, k, v, scale, window):
        calls.append((q.shape[1], k.shape[1], scale, window))

    def by_blocks(q, k, v, mask, span, scale):
        calls.append((q.shape[1], k.shape[1], mask, span.tolist(), scale))

    monkeypatch.setattr(bench, "causal_attention", causal)
    monkeypatch.setattr(bench, "attention_by_blocks", by_blocks)
    assert bench.attention_turn(model, 10)()["attention_s"] > 0
    assert [call[:2] for call in calls] == [(4, 4)] * 3 + [(4, 6), (4, 8), (4, 8), (2, 4), (2, 6), (2, 10)]
    assert calls[1][2:] == calls[2][2:] == (pytest.approx(10**-0.5), None)
    spans = [calls[n][3] for n in (0, 3, 4, 5, 6, 7, 8)]
    assert spans == [[0, 2, 0], [2, 2, 0], [4, 4, 0], [4, 8, 0], [2, 2, 0], [4, 4, 0], [8, 10, 0]]
    assert calls[6][2][0].tolist() == [[True] * 3 + [False], [False] + [True] * 3]
    assert calls[8][2][0].tolist() == [[True] * 9 + [False], [True] * 10]


# ---- Models and plans ----


def test_plans_of_the_command_line(model):
    plan = bench.parse_plan("taps2:0.5:3", model)
    assert (plan.layers, plan.full_depth_last, plan.full_depth_first) == ((3, 4), 3, 1)
    assert plan.projections.weight.shape == (2, 2, 20, 60)
    assert bench.parse_plan("taps1:0.5", model).projections.weight.shape == (2, 2, 20, 30)
    assert bench.parse_plan("default", model) == pop.PrunePlan((4,))
    assert model.prefill([[1, 2, 3, 4, 5]], model.new_cache(1, 8), plan=plan).isfinite().all()
    with pytest.raises(pop.InputError, match="--prune 0.1 prunes none of the 5 layers"):
        bench.parse_plan("0.1", model)


def test_random_weights_are_all_there():
    module = bench_shapes.random_module(
        tiny_config(vocab_size=70_000, hidden_size=64), torch.bfloat16, torch.device("cpu")
    )
    for parameter in module.parameters():
        assert parameter.dtype == torch.bfloat16 and parameter.device.type == "cpu" and not parameter.requires_grad
        if parameter.dim() > 1:  # 70,000 * 64 numbers are more than one block
            assert parameter.float().std() == pytest.approx(0.02, rel=0.1)
        else:
            assert (parameter == 1).all()


# ---- Images ----


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A folder with the shape of a tiny Qwen3-VL: an image of 256 x 256 pixels has 64 tokens."""
    folder, shape = tmp_path_factory.mktemp("seeing"), json.loads(json.dumps(bench_shapes.SHAPES["qwen3-vl-8b"]))
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    shape["text_config"] |= text | {"num_key_value_heads": 1, "vocab_size": 151_700, "dtype": "float32"}
    vision = {"hidden_size": 24, "intermediate_size": 40, "depth": 3, "num_heads": 3, "out_hidden_size": 32}
    shape["vision_config"] |= vision | {"num_position_embeddings": 25, "deepstack_visual_indexes": [1]}
    (folder / "config.json").write_text(json.dumps(shape))
    return str(folder)


def test_prompts_may_begin_with_an_image(seeing, capsys):
    """Its tower is in TTFT, in the FLOPs and in the limit."""
    options = ["--lengths", "80", "--prune", "0.5", "--runs", "2", "--decode-steps", "1", "--tasks", "prefill"]
    argv = ["--shape", seeing, "--image", "256x256", "--layers", "4", *options, "--compile", "false", "--device", "cpu"]
    assert bench.main(argv) == 0
    printed = capsys.readouterr().out
    assert "vision tower, an image of 256 x 256 pixels" in printed
    figures = json.loads(printed.splitlines()[-1])["prefill"]["80"]
    config, none = read_config(Path(seeing)), pop.PrunePlan.none()
    full, tower = cost.prefill_flops(config, 80, none, [256]), cost.vision_flops(config, [256])
    assert figures["tower"]["flops_share"] == tower / full
    limit = full / (cost.prefill_flops(config, 80, pop.PrunePlan((2, 3))) + tower)
    assert figures["plans"]["0.5"]["limit"] == pytest.approx(limit)
    assert figures["tower"]["share"]["median"] > 0
    assert figures["tower"]["ratio"]["median"] == pytest.approx(figures["tower"]["share"]["median"] * full / tower)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "256"], "--image is '256'; write width and height"),
        (["--image", "0x9"], "--image is '0x9'"),
        (["--image", "256x256", "--against", "transformers"], "--against compares text prompts"),
        (["--image", "256x256", "--lengths", "66"], "the image has 66 tokens; make --lengths longer"),
    ],
)
def test_images_that_cannot_be_measured(seeing, capsys, options, message):
    argv = ["--shape", seeing, "--layers", "1", "--prune", "1.0", "--compile", "false", "--tasks", "prefill", *options]
    assert bench.main(argv) == 2
    assert message in capsys.readouterr().err


def test_an_image_needs_a_model_that_sees(folder, capsys):
    argv = ["--shape", folder, "--image", "256x256", "--lengths", "99", "--tasks", "prefill", "--compile", "false"]
    assert bench.main(argv) == 2
    assert "the llama family does not" in capsys.readouterr().err


# ---- Rivals ----


def test_llama_cpp_reads_the_prompt_and_then_its_own_tokens(model, monkeypatch, tmp_path):
    calls = []

    class Llama:
        def __init__(self, path, **options):
            calls.append((path, options["n_ctx"], options["n_threads"]))

        def reset(self):
            calls.append("reset")

        def eval(self, tokens):
            calls.append(tokens)

        def sample(self, temp):
            assert temp == 0
            return len(calls)

    monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace(Llama=Llama))
    path = tmp_path / "m.gguf"
    path.touch()
    (rival,) = bench_rivals.llama_cpp(model, None, str(path))
    times = rival.turn([7, 8, 9], 2)()
    assert calls == [(str(path), 6, torch.get_num_threads()), "reset", [7, 8, 9], [3], [4]]
    assert set(times) == {"ttft_s", "step_s"}
    with pytest.raises(pop.InputError, match="needs --gguf"):
        bench_rivals.llama_cpp(model, None, None)


@pytest.mark.parametrize(("name", "module"), [("transformers", "transformers"), ("llama.cpp", "llama_cpp")])
def test_a_rival_that_is_not_installed_is_named(model, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(pop.MissingExtra, match="--against needs the package"):
        bench_rivals.RIVALS[name](model, {}, None)


# ---- The command line ----


def test_the_command_line_end_to_end(folder, tmp_path, capsys, monkeypatch):
    children = []

    def in_child(what, argv, cache, extra=()):
        children.append((what, *extra))
        return {"seconds": 1.0, "compiled": True, "peak_bytes": 3e9, "formula_bytes": 2e9, "ratio": 1.5}

    monkeypatch.setattr(bench, "in_child", in_child)
    monkeypatch.setattr(bench, "peak_turn", lambda *_: lambda: {"flops_per_s": 1e9})
    monkeypatch.setattr(bench, "bandwidth_turn", lambda *_: lambda: {"bytes_per_s": 1e9})
    path, drawn = tmp_path / "r.json", tmp_path / "r.svg"
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # words as words
    argv = ["--shape", folder, "--layers", "4", "--lengths", "16,8", "--runs", "1", "--decode-steps", "2"]
    argv += ["--plot", str(drawn)]
    assert bench.main([*argv, "--prune", "0.5", "--dtype", "bfloat16", "--device", "cpu", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert json.loads(path.read_text()) == result
    assert children == [("compile",), ("compile",), ("memory", "--lengths", "8"), ("memory", "--lengths", "16")]
    assert (result["layers"], result["all_layers"], result["dtype"], result["compiled"]) == (4, 5, "bfloat16", False)
    assert result["machine"]["threads"] == torch.get_num_threads() and result["versions"]["pop"] == pop.__version__
    assert list(result["prefill"]) == ["8", "16"] and list(result["prefill"]["8"]["plans"]) == ["0.5"]
    assert result["prefill"]["8"]["plans"]["0.5"]["layers"] == 2
    for text in ("4 layers of 5", "0.5, without 2 layers", "1.0 s cold", "1.500", "with 32,768 slots against 2,048"):
        assert text in out
    for text in ("all layers", "0.5", "time to first token, seconds"):
        assert f">{text}<" in drawn.read_text()


def test_the_children_measure_in_their_process(folder, capsys):
    argv = ["--model", folder, "--lengths", "8", "--compile", "false", "--device", "cpu"]
    assert bench.main([*argv, "--child", "compile"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["compiled"] is False and result["seconds"] < 5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "a", "--shape", "b"], "both given"),
        (["--model", "a", "--layers", "2"], "--layers shortens a --shape"),
        (["--shape", "nothing"], "give one of llama3.1-8b, smollm2-135m, qwen3-vl-8b, gemma3-12b, or a folder"),
        (["--shape", "FOLDER", "--layers", "9"], "--layers is 9, but .* has 5"),
        (["--model", "nothing"], "no known model"),
        (["--lengths", "12,x"], "--lengths is '12,x'"),
        (["--lengths", "0"], "the shortest of --lengths is 0"),
        (["--runs", "0"], "--runs is 0"),
        (["--decode-steps", "0"], "--decode-steps is 0"),
        (["--tasks", "all"], "--tasks holds 'all'; it knows compile, memory"),
        (["--against", "vllm"], "--against holds 'vllm'; it knows transformers, transformers-compiled, llama.cpp"),
        (["--json", "/nowhere/r.json"], "cannot be written"),
        (["--plot", "/nowhere/r.svg"], "cannot be written"),
        (["--plot", "r.pdf"], "ends in .svg or .png"),
        (["--plot", "r.svg", "--tasks", "slots"], "have it in --tasks"),
        (["--model", "FOLDER", "--lengths", "511", "--decode-steps", "2"], "has 513 tokens, but the model takes 512"),
        (["--model", "FOLDER", "--quantize", "int4"], "quantize='int4' is not offered"),
        (["--shape", "FOLDER", "--quantize", "int8", "--device", "cpu"], "the model has one of 30"),
        (["--quantize", "int8", "--against", "transformers"], "leave it or --quantize out"),
        (["--model", "FOLDER", "--prune", "x"], "--prune is 'x'"),
        (["--model", "FOLDER", "--prune", "none"], "prunes none"),
        (["--model", "FOLDER", "--against", "llama.cpp"], "llama-cpp-python"),
    ],
)
def test_bad_input_is_one_sentence(folder, argv, message, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    argv = [folder if word == "FOLDER" else word for word in argv]
    argv = ["--lengths", "8", "--tasks", "prefill", *argv]
    assert bench.main(argv) == 2
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert out == "" and line.startswith("bench.py: ")
    assert re.search(message, line)


def test_a_child_that_fails_says_why(folder):
    argv = ["--model", folder, "--lengths", "600", "--compile", "false"]
    with pytest.raises(pop.InputError, match=r"measures memory failed \(bench.py: .*512.*\); leave memory out"):
        bench.in_child("memory", argv, folder)
