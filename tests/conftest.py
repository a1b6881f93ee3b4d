"""Settings of the whole suite. `HYPOTHESIS_PROFILE=nightly pytest` searches far longer than the default."""

import os

import torch
from hypothesis import HealthCheck, settings

# Tiny tensors run faster without a thread pool to wake.
torch.set_num_threads(1)

_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("ci", max_examples=40, derandomize=True, **_common)
settings.register_profile("nightly", max_examples=400, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
