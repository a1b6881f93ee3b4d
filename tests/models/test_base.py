"""The contract of layers and models: the parts of a layer agree with its forward pass, in every family."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import assert_close, models

from pop.models.layers import causal_attention


def inputs(module, seed):
    """h [2, 5, D] and the rotary tables of each window."""
    h = torch.randn(2, 5, module.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    return h, module.rope(torch.arange(5).expand(2, -1))


@given(models(), st.integers(0, 9))
def test_keys_and_values_are_those_of_the_whole_layer(module, seed):
    h, ropes = inputs(module, seed)
    for layer in module.layers:
        _, *expected = layer.queries_keys_values(h, ropes[layer.window])
        placed = layer.placed(*layer.projected(h), ropes[layer.window])
        for part, other, wanted in zip(layer.keys_values(h, ropes[layer.window]), placed, expected, strict=True):
            assert_close(part, wanted)
            assert_close(other, wanted)


@given(models(), st.integers(0, 9))
def test_folded_projections_give_the_projections_of_the_normalised_state(module, seed):
    """Norms get random weights, so that leaving one out shows."""
    h, _ = inputs(module, seed)
    for layer in module.layers:
        layer.input_layernorm.weight.data.normal_(generator=torch.Generator().manual_seed(seed))
        weight, bias = layer.folded_projections()
        found = torch.einsum("btd,pkd->pbtk", layer.normalised(h).double(), weight) + bias[:, None, None]
        assert_close(found.float(), torch.stack(layer.projected(h)))


@given(models())
def test_the_pass_calls_each_layer_as_a_module(module):
    """So hooks work, and so does a step that skips layers."""
    tokens, called, features = torch.arange(12).view(2, 6), [], module.config.hidden_size
    for index, layer in enumerate(module.layers):
        layer.register_forward_hook(lambda layer, args, h, index=index: called.append((index, h.shape)))
    logits = module(tokens)
    assert called == [(index, (2, 6, features)) for index in range(len(module.layers))]
    assert logits.shape == (2, 6, module.config.vocab_size) and logits.dtype == torch.float32

    def by_parts(index, layer, h, rope, attend):
        q, k, v = layer.queries_keys_values(h, rope)
        h = h + layer.attention_update(causal_attention(q, k, v, layer.scale, layer.window))
        return h + layer.mlp_update(h)

    assert_close(module.head(module.through_layers(tokens, step=by_parts)), logits)
    skipped = module.through_layers(tokens, step=lambda index, layer, h, rope, attend: h)
    assert torch.equal(skipped, module.embed(tokens))
