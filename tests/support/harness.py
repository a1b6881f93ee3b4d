"""Stand-ins for lm-evaluation-harness, and the naive page of the method as its reference."""

import sys
from types import ModuleType, SimpleNamespace

import torch
from support.tiny_chat import CONTROL, HIDDEN, VISIBLE

from pop.pruning import reference


def stand_in(monkeypatch) -> dict[str, type]:
    """Put empty modules in place of the harness. Returns the models that are registered with it, by name."""
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry", "lm_eval.__main__"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    registered = {}
    sys.modules["lm_eval.api.model"].LM = object
    sys.modules["lm_eval.api.registry"].register_model = lambda name: lambda model: registered.setdefault(name, model)
    return registered


def instances(*arguments):
    """Requests in the shape of the harness's Instance."""
    return [SimpleNamespace(args=args, request_type="any") for args in arguments]


def ids(text: str) -> list[int]:
    """The ids of support.tiny_chat's tokenizer: one for each byte, after those of the control tokens."""
    order = [*VISIBLE, *HIDDEN]
    return [len(CONTROL) + order.index(byte) for byte in text.encode()]


def naive_logits(model, plan, prompt: list[int], continuation: list[int]) -> torch.Tensor:
    """The logits [C, V] that predict the continuation of a prompt, by the reference."""
    tokens = torch.tensor(prompt + continuation)
    full_depth = reference.full_depth_tokens(len(prompt), len(tokens), plan)
    return reference.forward(model.module, tokens, full_depth, plan)[0][len(prompt) - 1 : -1]


def naive(adapter, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The log-likelihood, and whether it is greedy, by the reference: every request runs all of its tokens."""
    logits = naive_logits(adapter.model, adapter.model.plan, context, continuation)
    picked = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])
    return picked.sum().item(), logits.argmax(-1).tolist() == continuation


def close(results, expected) -> bool:
    return [greedy for _, greedy in results] == [greedy for _, greedy in expected] and torch.allclose(
        torch.tensor([value for value, _ in results]), torch.tensor([value for value, _ in expected]), atol=1e-4
    )
