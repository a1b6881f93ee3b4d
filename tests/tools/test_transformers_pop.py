"""tools/transformers_pop.py without transformers: on a decoder that is called as those of transformers are.

So is the press for kvpress in tools/kvpress_pop.py, which is a context of transformers_pop.py.

`python -m tools.transformers_pop --check` compares the models of transformers themselves.
"""

import copy
import dataclasses
import json
import sys
import types
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.cases import assert_close, random_corrections
from support.plans import contents
from support.tiny import hf_config, tiny_config
from torch import nn

import pop
from pop import InputError, PlanError, PrunePlan
from pop.errors import UnsupportedError
from pop.models import llama
from pop.models.layers import rope_frequencies
from tools import kvpress_pop
from tools.kvpress_pop import PopPress
from tools.transformers_pop import PrunedLayer, as_pop, calibrate, check_last_token, library, positions, pruned

CONFIG = tiny_config()
TURNS = [[3, 12, 7], [5, 2, 9]]  # lengths of the rows' messages


class Layer(llama.DecoderLayer):
    """A layer with the arguments that layers have in transformers."""

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, cache=None, **_):
        rope = tuple(table[:, :, None, : CONFIG.head_dim // 2] for table in position_embeddings)
        q, k, v = (x.transpose(1, 2) for x in self.queries_keys_values(hidden_states, rope))
        k, v = (k, v) if cache is None else cache.update(k, v, self.index)
        attended = F.scaled_dot_product_attention(q, k, v, attention_mask, scale=self.scale, enable_gqa=True)
        h = hidden_states + self.attention_update(attended.transpose(1, 2).flatten(2))
        return h + self.mlp_update(h)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(CONFIG.vocab_size, CONFIG.hidden_size)
        self.layers = nn.ModuleList(Layer(CONFIG, index) for index in range(CONFIG.num_layers))
        for index, layer in enumerate(self.layers):
            layer.index = index
            layer.self_attn.scaling = layer.scale
        self.norm = pop.models.layers.RMSNorm(CONFIG.hidden_size, CONFIG.norm_eps)
        self.config = types.SimpleNamespace(_attn_implementation="sdpa")

    def forward(self, input_ids=None, attention_mask=None, cache=None, **kwargs):
        B, T = input_ids.shape
        past = 0 if cache is None else cache.get_seq_length()
        mask = torch.ones(B, past + T) if attention_mask is None else attention_mask
        angles = (mask.cumsum(1) - 1)[:, -T:, None] * rope_frequencies(CONFIG.rope, CONFIG.head_dim, "cpu")
        angles = torch.cat((angles, angles), dim=-1)
        seen = torch.ones(past + T, past + T).tril()[-T:] * mask[:, None] + torch.eye(past + T)[-T:]  # [B, T, N]
        h = self.embed_tokens(input_ids)
        for layer in self.layers:
            tables = angles.cos(), angles.sin()
            h = layer(h, attention_mask=seen[:, None] > 0, position_embeddings=tables, cache=cache, **kwargs)
        return (self.norm(h),)


def write_config(folder):
    (Path(folder) / "config.json").write_text(json.dumps(hf_config(CONFIG)))


class LlamaForCausalLM(nn.Module):
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        super().__init__()
        self.model, self.lm_head = Decoder(), nn.Linear(CONFIG.hidden_size, CONFIG.vocab_size, bias=False)
        self.config = types.SimpleNamespace(save_pretrained=write_config)
        self.generation_config = types.SimpleNamespace(use_mtp=False)

    def forward(self, input_ids, attention_mask=None, labels=None, logits_to_keep=1, **kwargs):
        kwargs["attention_mask"] = attention_mask
        return self.lm_head(self.model(input_ids=input_ids, **kwargs)[0][:, -logits_to_keep:]).squeeze(1)

    def generate(self, input_ids, generation_config=None, assistant_model=None, **kwargs):
        return self(input_ids, **kwargs).argmax(-1)

    def init_continuous_batching(self):
        return "a manager"

    def generate_batch(self, inputs):
        return self.init_continuous_batching()


class Cache:
    def __init__(self):
        empty = torch.zeros(1, 1, 0, 1)
        self.layers = [types.SimpleNamespace(keys=empty, values=empty) for _ in range(CONFIG.num_layers)]

    def get_seq_length(self, index=0):
        return self.layers[index].keys.shape[2]

    def update(self, k, v, index):
        layer, is_first = self.layers[index], self.get_seq_length(index) == 0
        layer.keys = k if is_first else torch.cat((layer.keys, k), dim=2)
        layer.values = v if is_first else torch.cat((layer.values, v), dim=2)
        return layer.keys, layer.values


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    library = types.ModuleType("transformers")
    library.__version__ = "5.24.0"
    library.LlamaForCausalLM = LlamaForCausalLM
    library.Qwen3ForCausalLM = int
    library.Gemma3ForCausalLM = str
    monkeypatch.setitem(sys.modules, "transformers", library)
    return library


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = LlamaForCausalLM().eval().requires_grad_(False)
    for weight in model.parameters():
        weight.mul_(3 if weight.dim() == 2 else 1).add_(0.1 * torch.randn_like(weight))
    return model


def plan_of(model, is_calibrated=True, **selects):
    layers = (1, 3, 4)  # h is updated after the first group
    plan = PrunePlan(layers, full_depth_last=3, full_depth_first=2, **selects)
    corrections = random_corrections(CONFIG, layers, 1, 7, as_pop(model)) if is_calibrated else None
    return dataclasses.replace(plan, corrections=corrections)


def padded(rows, left):
    T = max(map(len, rows))
    return torch.tensor([[0] * (T - len(row)) + row if left else row + [0] * (T - len(row)) for row in rows])


@pytest.mark.parametrize("is_calibrated", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"full_depth_below": 9},
        {"full_depth_below": 13},  # all of the first turn is at full depth
        {"full_depth_selected": 0.5},
        {"full_depth_selected": 0.5, "selecting_layer": 2},
    ],
    ids=str,
)
@pytest.mark.usefixtures("short_averages")
def test_turns_of_a_ragged_batch_equal_the_engine(model, is_calibrated, fields):
    twin, plan, cache = as_pop(model), plan_of(model, is_calibrated, **fields), Cache()
    other, mask, last = twin.new_cache(3, 40), torch.zeros(3, 0, dtype=torch.int64), [[]] * 3
    for turn in TURNS:
        rows = [old + torch.randint(3, CONFIG.vocab_size, (n,)).tolist() for old, n in zip(last, turn, strict=True)]
        lengths = torch.tensor([len(row) for row in rows])
        with pruned(model, plan):
            ids = padded(rows, left=True)
            mask = torch.cat((mask, (torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]).long()), dim=1)
            found = [model(ids, attention_mask=mask, cache=cache)]
            token = found[0].argmax(-1)
            mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.int64)), dim=1)
            found.append(model(token[:, None], attention_mask=mask, cache=cache))
        other.skipped.fill_(-1)  # pop would select among these too
        expected = twin.prefill(padded(rows, left=False), other, lengths=lengths, plan=plan)
        assert_close(found[0], expected)
        assert_close(found[1], twin.decode(token, other))
        last = found[1].argmax(-1)[:, None].tolist()


def test_a_prompt_at_full_depth_is_the_models_own(model, monkeypatch):
    """Also one with padding. Nothing is pruned, so nothing is gathered or computed twice."""
    plan = dataclasses.replace(plan_of(model, full_depth_selected=0.5), full_depth_below=9)
    ids = torch.randint(3, CONFIG.vocab_size, (2, 8))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    monkeypatch.setattr(PrunedLayer, "_run_rows", None)
    with pruned(model, plan):
        found = model(ids, attention_mask=mask, cache=Cache())
    assert torch.equal(found, model(ids, attention_mask=mask, cache=Cache()))


def test_a_copied_cache_goes_on_without_an_answer_between_the_prompts(model):
    plan, ids, cache = plan_of(model), torch.randint(3, CONFIG.vocab_size, (2, 11)), Cache()
    twin = as_pop(model)
    other = twin.new_cache(2, 20)
    with pruned(model, plan):
        model(ids[:, :6], cache=cache)
        found = model(ids[:, 6:], cache=copy.deepcopy(cache))
    twin.prefill(ids[:, :6], other, plan=plan)
    assert_close(found, twin.prefill(ids[:, 6:], other, plan=plan))


def test_only_the_last_token_of_a_prompt_has_scores(model):
    """The log-likelihood of a continuation that is part of the prompt is no number, also if it is at full depth."""
    plan = dataclasses.replace(plan_of(model, is_calibrated=False), full_depth_last=3)
    ids = torch.randint(3, CONFIG.vocab_size, (2, 9))
    with pruned(model, plan):
        logits = model(ids, cache=Cache(), logits_to_keep=9)
        for args, labels in ([], {"labels": ids}), ([None, ids], {}):
            with pytest.raises(UnsupportedError, match="labels"):
                model(ids, *args, cache=Cache(), **labels)
    assert logits[:, -1].isfinite().all() and logits[:, :-1].isnan().all()
    with pruned(model, PrunePlan.none()):
        assert_close(model(ids, cache=Cache(), logits_to_keep=9), model(ids, logits_to_keep=9))


def test_leaving_restores_the_model_after_an_exception_too(model):
    before = {part: dict(vars(part)) for part in model.modules()}
    context = pruned(model, PrunePlan((3,)))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), context:
            assert "forward" in vars(model.model.layers[3])
            assert "forward" not in vars(model.model.layers[2])
            with pytest.raises(UnsupportedError, match="pruned already"), context:
                pass
            1 / 0  # noqa: B018
        assert all(vars(part) == before[part] for part in model.modules())


def test_what_is_refused(model):
    ids, plan, cache = torch.ones(1, 4, dtype=torch.int64), PrunePlan((3,)), Cache()
    changed = copy.deepcopy(model)
    changed.model.layers[3].self_attn.k_proj.weight += 1
    for error, named, subject, refused in (
        (UnsupportedError, "Linear", nn.Linear(1, 1), plan),
        (PlanError, "layer 9", model, PrunePlan((9,))),
        (PlanError, "other weights", changed, plan_of(model)),
        (UnsupportedError, "train", copy.deepcopy(model).train(), plan),
    ):
        with pytest.raises(error, match=named), pruned(subject, refused):
            pass
    with pruned(model, plan):
        config = types.SimpleNamespace(prefill_chunk_size=2)
        for named, args, options in (
            ("prompt_lookup_num_tokens", [], {"prompt_lookup_num_tokens": 2}),
            ("prefill_chunk_size", [], {"generation_config": config}),
            ("prefill_chunk_size", [config], {}),
            ("assistant_model", [None, model], {}),
        ):
            with pytest.raises(UnsupportedError, match=named):
                model.generate(ids, *args, **options)
        with pytest.raises(UnsupportedError, match="continuous batching"):
            model.generate_batch([[1, 2]])
        with pytest.raises(UnsupportedError, match="object"):  # of a batch that had begun before
            model(ids, cache=object())
        with pytest.raises(InputError, match="use_cache"):
            model(ids)
        with pytest.raises(InputError, match="left"):
            model(ids, attention_mask=torch.tensor([[1, 1, 1, 0]]), cache=cache)
    model(ids, cache=cache)
    for _ in range(2):
        with pytest.raises(InputError, match="without this calibrated plan"), pruned(model, plan_of(model)):
            model(ids, cache=cache)
    assert model.generate_batch([[1, 2]]) == "a manager"


def test_rows_that_were_reordered_are_refused(model):
    """As beam search leaves them. The state that is kept for the next prompt would be another row's."""
    ids, cache = torch.randint(3, CONFIG.vocab_size, (2, 6)), Cache()
    with pruned(model, plan_of(model)):
        model(ids, cache=cache)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.flip(0), layer.values.flip(0)
        with pytest.raises(InputError, match="moved"):
            model(ids, cache=cache)


def test_a_context_that_ends_during_a_prompt_is_noticed(model):
    ids, layer, context = torch.ones(1, 4, dtype=torch.int64), model.model.layers[0], pruned(model, PrunePlan((3,)))
    handle = layer.register_forward_hook(lambda *_: context.__exit__())
    context.__enter__()
    with pytest.raises(InputError, match="ended"):
        model(ids, cache=Cache())
    handle.remove()


def test_calibrates_the_model_itself(model):
    texts = [torch.randint(3, CONFIG.vocab_size, (90,)).tolist() for _ in range(4)]
    options = {"rank": 8, "longest": 48, "steps": 0, "progress": False}
    plan = calibrate(model, texts, PrunePlan((3, 4)), **options)
    expected = pop.calibrate(as_pop(model), texts, PrunePlan((3, 4)), **options)
    assert contents(plan) == contents(expected)
    pruned(model, plan)


# ---- Positions ----

MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
COUNTED = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])  # as generate numbers them
EXPECTED = [[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]]
THREE_HELD = types.SimpleNamespace(get_seq_length=lambda: 3)
HIDES = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]])  # such as padding after an answer that ended early


@pytest.mark.parametrize(
    ("tokens", "cache", "mask", "counted", "expected"),
    [
        (5, None, MASK, None, EXPECTED),
        (5, None, {"full_attention": None}, COUNTED, EXPECTED),
        (3, None, None, None, [[0, 1, 2]] * 2),
        (2, THREE_HELD, HIDES, None, [[2, 3], [3, 4]]),
        # Padding has position 0. So has a row's first token, but not on a filled cache.
        (3, THREE_HELD, {}, torch.tensor([[0, 0, 1], [3, 4, 5]]), [[-1, -1, 1], [3, 4, 5]]),
    ],
)
def test_positions_from_both_kinds_of_masks(tokens, cache, mask, counted, expected):
    assert positions(2, tokens, cache, mask, counted).tolist() == expected


def test_masks_that_are_refused():
    with pytest.raises(InputError, match="position_ids"):
        positions(2, 5, None, {"full_attention": None}, None)
    with pytest.raises(InputError, match="left"):
        positions(2, 5, None, {}, torch.tensor([[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]))


@pytest.mark.parametrize("form", ["padding", "attention", "eager attention", "by kind of layer"])
def test_a_mask_must_not_hide_the_last_token_of_the_cache(form):
    """A code would take it for the one before the next turn."""

    def as_given(mask):  # [2, 5]
        attended = (mask[:, None, None] * torch.ones(2, 5).tril(3)).bool()  # [2, 1, 2, 5]
        lowest = torch.finfo(torch.float32).min
        return {
            "padding": mask,
            "attention": attended,
            "eager attention": torch.zeros(attended.shape).masked_fill(~attended, lowest),
            "by kind of layer": {"full_attention": attended, "sliding_attention": attended[..., :2]},
        }[form]

    check_last_token(THREE_HELD, as_given(torch.ones(2, 5, dtype=torch.long)))
    with pytest.raises(InputError, match="last token"):
        check_last_token(THREE_HELD, as_given(HIDES))


def test_other_versions_of_transformers_are_refused(stand_in):
    for version, found in {"5.2.0": (5, 2), "5.24.9": (5, 24)}.items():
        stand_in.__version__ = version
        assert library() == (stand_in, found)
    for version in ("5.25.0.dev0", "4.57.6", "5.1.4", "6.0"):
        stand_in.__version__ = version
        with pytest.raises(UnsupportedError, match=version):
            library()


def test_static_caches_need_a_version_that_counts_their_tokens(model, stand_in):
    ids, cache = torch.ones(1, 4, dtype=torch.int64), Cache()
    cache.is_compileable = True
    stand_in.__version__ = "5.5.4"
    with pytest.raises(UnsupportedError, match="static"), pruned(model, PrunePlan((3,))):
        model(ids, cache=cache)
    stand_in.__version__ = "5.6.0"
    with pruned(model, PrunePlan((3,))):
        model(ids, cache=cache)


# ---- The press for kvpress ----


def test_a_press_prunes_the_context_of_a_question(model):
    """kvpress encodes a context in the press's context, and the question after it."""
    ids, plan = torch.randint(3, CONFIG.vocab_size, (1, 12)), plan_of(model, full_depth_selected=0.5)
    press = PopPress(plan)
    found = []
    for context in (press(model), pruned(model, plan), nullcontext()):
        cache = Cache()
        with context:
            model.model(input_ids=ids, past_key_values=cache, cache=cache)
        found.append(torch.stack([torch.stack((layer.keys, layer.values)) for layer in cache.layers]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0][4], found[2][4])
    assert press(model) is press(model) and press(copy.deepcopy(model)).model is not model
    press.compression_ratio = 0.5  # as an evaluation sets it
    with pytest.raises(InputError, match="compression_ratio is 0.5"):
        press(model)


def test_the_evaluation_of_kvpress_gets_the_press(monkeypatch, capsys):
    assert kvpress_pop.main(["folder"]) == 2 and "kvpress" in capsys.readouterr().err
    registry = types.SimpleNamespace(PRESS_REGISTRY={"knorm": None}, DATASET_REGISTRY={"ruler": "OWNER/ruler"})
    datasets, called = registry.DATASET_REGISTRY, []
    entry = types.SimpleNamespace(CliEntryPoint="entry")
    monkeypatch.setitem(sys.modules, "evaluate_registry", registry)
    monkeypatch.setitem(sys.modules, "evaluate", entry)
    monkeypatch.setitem(sys.modules, "fire", types.SimpleNamespace(Fire=lambda *args: called.append(args)))
    assert kvpress_pop.main(["folder", "--plan", "0.5", "--data", "local", "--dataset", "ruler"]) == 0
    options = ["--dataset", "ruler", "--press_name", "pop", "--compression_ratio", "0"]
    assert called == [("entry", options)]
    assert registry.PRESS_REGISTRY["pop"] == PopPress("0.5")
    assert datasets == {"ruler": "local"}  # the dictionary that evaluate.py has imported
