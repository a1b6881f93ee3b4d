"""The models of the tests of conversations and prefixes."""

import pytest
from support.chat_models import PAIRS, PLANS, make


@pytest.fixture(params=PAIRS, ids=", ".join)
def model(request):
    family, plan = request.param
    return make(family, PLANS[plan])
