import importlib.util

import pytest

if importlib.util.find_spec("vllm") is None:  # only the choice of rows and the start are tested then
    collect_ignore_glob = ["test_[!rs]*.py", "test_runners.py", "test_smollm2.py"]
else:
    from engines import FAMILIES, Engine, write_checkpoint

    @pytest.fixture(scope="session", params=FAMILIES)
    def engine(request, tmp_path_factory) -> Engine:
        """An engine on a tiny model of each family."""
        folder = tmp_path_factory.mktemp("checkpoints") / request.param
        write_checkpoint(folder, request.param)
        return Engine(folder)
