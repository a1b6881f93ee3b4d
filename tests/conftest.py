"""Settings of the whole suite. `HYPOTHESIS_PROFILE=nightly pytest` searches far longer than the default."""

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

pytest.register_assert_rewrite("support")  # so that a failure in it shows values

# Nothing of pop is imported here, so that test_architecture.py can name an import that breaks it.

# Tiny tensors run faster without a thread pool to wake.
torch.set_num_threads(1)

_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
_without_shrinking = [Phase.explicit, Phase.reuse, Phase.generate]  # to make an example smaller can take minutes
settings.register_profile("ci", max_examples=12, derandomize=True, phases=_without_shrinking, **_common)
settings.register_profile("nightly", max_examples=400, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# hypothesis prints a failing example by this method. A module's own text would be a page for each layer.
torch.nn.Module._repr_pretty_ = lambda self, printer, cycle: printer.text(f"<{getattr(self, 'config', type(self))}>")


def pytest_collection_modifyitems(items):
    """Start with the files that take minutes. Otherwise one process could be left with such a file at the end."""
    longest = ("test_real_model", "test_compile", "test_tensor_parallel")
    items.sort(key=lambda item: item.module.__name__.rpartition(".")[2] not in longest)


def pytest_runtest_setup(item):
    if not item.get_closest_marker("cuda"):
        return
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    if torch.cuda.get_device_name().startswith("FAKE"):
        pytest.skip("the GPU is a stand-in that computes nothing")


@pytest.fixture(params=[torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.cuda)], ids=str)
def device(request):
    """The CPU, and the GPU where there is one. A test that makes sense on a GPU only has the mark `cuda`."""
    return request.param


@pytest.fixture(scope="module")
def small_query_blocks():
    """Attention in blocks of three queries, so that tiny prompts have several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pop.engine.attention.QUERY_BLOCK", 3)
        yield


@pytest.fixture(scope="module")
def short_averages():
    """Scores for selecting tokens are averages over three tokens, so that those of a tiny prompt differ."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pruning.selection", "pruning.reference"):
            patch.setattr(f"pop.{name}.POOLED", 3)
        yield


@pytest.fixture
def notes(monkeypatch):
    """notes(owner, name, note): a list, to which each call of owner.name adds what `note` makes of its arguments."""

    def take(owner, name, note):
        taken, call = [], getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **more: taken.append(note(*args, **more)) or call(*args, **more))
        return taken

    return take


def real_weights(name, required=False):
    """The folder of real weights. Without it a test is skipped, unless it is required."""
    from pop import WeightsNotFound
    from pop.checkpoints import registry

    try:
        return registry.find_weights(name)
    except WeightsNotFound as error:
        if required:
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def gemma3():
    """The real Gemma-3-270M, which the README's demo does not fetch."""
    return real_weights("gemma3-270m")


@pytest.fixture(scope="session")
def smollm2():
    """The real SmolLM2. Where $POP_REQUIRE_WEIGHTS is set, it must be there."""
    return real_weights("smollm2-135m", required=os.environ.get("POP_REQUIRE_WEIGHTS"))
