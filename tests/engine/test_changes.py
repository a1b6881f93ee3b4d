"""Changes of a module take effect in compiled code and in a captured decode step, as they do in a model run eagerly."""

import contextlib
import copy
from functools import partial

import pytest
import torch
from support.cases import assert_close, new_cache
from support.compiler import IS_OLD, requires_compiler, requires_new_torch
from support.nightly import NIGHTLY
from support.tiny import random_model, tiny_config
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

import pop
from pop import engine
from pop.engine.changes import Kinds
from pop.engine.compile import ReadyStages
from pop.engine.decode_step import DecodeStep
from pop.models import gemma3

PRUNED = pop.PrunePlan((1,))


class Negative(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return -self.part(x)


def after(part, args, out):
    return out.roll(1, -1)


def after_mlp(part, args, out):
    return out.roll(1, -1) if type(part).__name__ == "MLP" else None


def setting(part, name, value):
    """Set an attribute, and return what undoes it."""
    missing = object()
    old = getattr(part, name) if name in part._parameters or name in part._modules else vars(part).get(name, missing)
    setattr(part, name, value)
    return lambda: delattr(part, name) if old is missing else setattr(part, name, old)


def parametrized(part):
    parametrize.register_parametrization(part, "weight", nn.Softplus())
    return lambda: parametrize.remove_parametrizations(part, "weight", leave_parametrized=False)


def narrowed(mlp):
    """Fewer inner numbers, in views of the same memory."""
    parts = (mlp.gate_proj, slice(7)), (mlp.up_proj, slice(7)), (mlp.down_proj, (..., slice(7)))
    undo = [setting(part, "weight", nn.Parameter(part.weight.detach()[kept])) for part, kept in parts]
    return lambda: [one() for one in undo]


def with_data(weight, values):
    old, weight.data = weight.data, values
    return lambda: setattr(weight, "data", old)


def in_place(weight):
    weight.detach().mul_(2)
    return lambda: weight.detach().div_(2)


def another_layer(layers):
    old, layers[1] = layers[1], random_model(tiny_config(), seed=8).layers[1]
    return lambda: layers.__setitem__(1, old)


def of_class(part, kind):
    old, part.__class__ = part.__class__, kind
    return lambda: setattr(part, "__class__", old)


# Each takes a layer, the list of layers and the last norm, and returns a function that undoes it.
CHANGES = {
    "adapter": lambda layer, *_: setting(layer.self_attn, "v_proj", Negative(layer.self_attn.v_proj)),
    "forward": lambda layer, *_: setting(layer.mlp, "forward", lambda x: x * 0.5),
    "method": lambda layer, *_: setting(layer, "mlp_update", lambda h: h * 0.5),
    "hook on layer": lambda layer, *_: layer.register_forward_hook(after).remove,
    "hook on mlp": lambda layer, *_: layer.mlp.register_forward_hook(after).remove,
    "hook on last norm": lambda layer, layers, norm: norm.register_forward_hook(after).remove,
    "hook on all": lambda *_: register_module_forward_hook(after_mlp).remove,
    "eps": lambda layer, *_: setting(layer.input_layernorm, "eps", 0.7),
    "eps of last norm": lambda layer, layers, norm: setting(norm, "eps", 0.7),
    "weight replaced": lambda layer, *_: setting(
        layer.self_attn.v_proj, "weight", nn.Parameter(2 * layer.self_attn.v_proj.weight.detach())
    ),
    "data replaced": lambda layer, *_: with_data(layer.mlp.up_proj.weight, 2 * layer.mlp.up_proj.weight.data),
    "in place": lambda layer, *_: in_place(layer.mlp.up_proj.weight),
    "bias": lambda layer, *_: setting(layer.self_attn.v_proj, "bias", nn.Parameter(torch.ones(20))),
    "narrow": lambda layer, *_: narrowed(layer.mlp),
    "strides": lambda layer, *_: setting(
        layer.self_attn.o_proj, "weight", nn.Parameter(torch.randn(60, 30).T / 5, requires_grad=False)
    ),
    "class": lambda layer, *_: of_class(layer.mlp, gemma3.MLP),
    "parametrization": lambda layer, *_: parametrized(layer.self_attn.v_proj),
    "another layer": lambda layer, layers, norm: another_layer(layers),
    "compiled part": lambda layer, *_: setting(layer, "mlp", torch.compile(Negative(layer.mlp), backend="eager")),
}


# Attributes that nobody looks at: after a change of one, users call model.recompile().
ATTRIBUTES = {"forward", "method", "eps", "eps of last norm"}


@contextlib.contextmanager
def changed(module, name, model=None):
    undo = CHANGES[name](module.layers[1], module.layers, module.model.norm)
    try:
        yield
    finally:
        undo()
        if name in ATTRIBUTES:
            model.recompile()


def logits(model, plan=PRUNED):
    """Of a prefill and of a decode step."""
    cache = model.new_cache(1, 20)
    return torch.stack([model.prefill([[1, 2, 3, 4, 5]], cache, plan=plan), model.decode([6], cache)])


@contextlib.contextmanager
def counted_compilations():
    """A list that grows with each graph. No code comes from the graphs, since that would take most of the time."""
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        yield compilations


@pytest.fixture(scope="module")
def shared():
    """A compiled and an eager model of one module, the module, and the compilations so far. Without a warm-up."""
    with counted_compilations() as compilations, torch._dynamo.config.patch(specialize_float=True):
        module = random_model(tiny_config(num_layers=2), seed=1)
        compiled, eager = (pop.Model(module, module.config, compile=it) for it in (True, False))
        compiled._stages._run = lambda *_: None
        yield compiled, eager, module, compilations


NIGHTLY_ONLY = {"forward", "hook on last norm", "eps of last norm", "strides"}  # each compiles anew


@requires_compiler
@pytest.mark.parametrize("name", CHANGES if NIGHTLY else [name for name in CHANGES if name not in NIGHTLY_ONLY])
def test_compiled_code_follows_a_change_and_back(shared, name):
    """The change has the effect that it has eagerly. The first call compiles it, and undoing it compiles nothing."""
    if IS_OLD and name in ("eps", "parametrization"):
        pytest.skip("this torch looks at eps itself, or cannot compile a parametrization")
    compiled, eager, module, compilations = shared
    original = logits(compiled)
    with changed(module, name, compiled):
        expected = logits(eager)
        assert (expected - original).abs().max() > 1e-2
        if name == "eps":
            assert_close(logits(compiled), original)
        if name in ATTRIBUTES:
            compiled.recompile()
        assert_close(logits(compiled), expected)
        number = len(compilations)
        assert_close(logits(compiled), expected)
    assert_close(logits(compiled), original)
    assert len(compilations) == number
    assert number  # so these are compiled models


@requires_compiler
def test_decode_sees_a_hook_that_is_new_since_the_prefill(shared):
    compiled, eager, module, _ = shared
    caches = [model.new_cache(1, 20) for model in (compiled, eager)]
    for model, cache in zip((compiled, eager), caches, strict=True):
        model.prefill([[1, 2, 3]], cache)
        for _ in range(3):  # the last one repeats recorded work
            model.decode([4], cache)
    undo = CHANGES["hook on mlp"](module.layers[1])
    assert_close(*(model.decode([5], cache) for model, cache in zip((compiled, eager), caches, strict=True)))
    undo()


def test_a_weight_that_reaches_beyond_its_memory_is_refused():
    """Products of torch would read on, and so would compiled code."""
    module = random_model(tiny_config(num_layers=2))
    kinds = Kinds()
    kinds.take_snapshots(module.layers)
    memory = module.layers[1].mlp.up_proj.weight.untyped_storage()
    memory.resize_(memory.nbytes() - 1)
    with pytest.raises(RuntimeError, match="out of bounds for storage"):
        kinds.of(module.layers[1])
    for _ in range(2):
        assert not kinds.unchanged()
        with pytest.raises(RuntimeError, match="out of bounds for storage"):
            kinds.take_snapshots(module.layers)


@requires_new_torch
@requires_compiler
def test_layers_may_differ_in_which_weights_are_trained(shared):
    compiled, _, module, compilations = shared
    original, number = logits(compiled), len(compilations)
    for layer, part in zip(module.layers, ("mlp", "self_attn"), strict=True):
        layer.requires_grad_(False)
        layer.get_submodule(part).requires_grad_(True)
    assert_close(logits(compiled), original)
    assert len(compilations) == number
    module.requires_grad_(True)


@requires_compiler
def test_hooks_see_each_call_once_and_no_warm_up():
    """A hook on a layer sees the tokens that run at full depth. One on a projection sees all tokens."""
    module = random_model(tiny_config(num_layers=2), seed=1)
    compiled, eager = (pop.Model(module, module.config, compile=it) for it in (True, False))
    seen = []
    for part in (module.layers[1], module.layers[1].self_attn.k_proj):
        part.register_forward_hook(lambda part, args, out: seen.append(args[0].shape[1]))
    with counted_compilations():
        compiled.warmup()
        assert not seen
        for model in (compiled, eager):
            logits(model)
            assert seen == [5, 1, 1, 1, 1]  # the projection: the prompt; then both: its last token, and the next one
            seen.clear()


class Captured:
    """Does what a CUDA graph does: runs the module as it was, at the addresses that its weights had."""

    def __init__(self, module, batch_size):
        self.owner = None

    def __call__(self, step):
        if self.owner is None:
            self.owner = copy.copy(step.func.__self__)
            weights = {id(weight): weight.detach() for weight in self.owner.module.parameters()}
            self.owner.module = copy.deepcopy(self.owner.module, weights)
        return tuple(output.clone() for output in DecodeStep.step(self.owner, *step.args))


@pytest.mark.parametrize("name", sorted(CHANGES.keys() - ATTRIBUTES - {"parametrization"}))  # undoing it breaks copies
def test_a_captured_step_follows_a_change_and_back(name):
    module = random_model(tiny_config(num_layers=2), seed=1)
    captured, plain = new_cache(module, 1), new_cache(module, 1)
    ready = ReadyStages(module, Captured)

    def assert_same():
        stages = ready(1)  # as a prefill does
        for token in torch.tensor([[3], [4]]):
            found = engine.decode(module, token, captured, stages)
            torch.testing.assert_close(found, engine.decode(module, token, plain), rtol=0, atol=1e-5)
            assert torch.equal(captured.lengths, plain.lengths)

    assert_same()
    with changed(module, name):
        assert_same()
    assert_same()


def test_the_memory_of_weights_stays_until_the_next_look():
    """A captured step has its addresses. A module that has moved to another device and back has other memory."""
    module = random_model(tiny_config(num_layers=2), seed=1)
    ready = ReadyStages(module, Captured)
    stages = ready(1)
    weight = module.layers[1].mlp.up_proj.weight
    weight.data.mul_(2)  # in place
    assert ready(1) is stages
    address = weight.data_ptr()
    weight.data = weight.data.clone()
    assert ready(1, compare=False) is stages  # as a decode step asks
    held = {memory.data_ptr() for snapshot in ready._kinds.snapshots.values() for memory in snapshot.memory}
    assert address in held
    assert ready(1) is not stages
