"""kernels.cpp under the address and undefined-behaviour sanitizers, for each kind of vector, in the nightly profile."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from random import Random

import pytest
from support.nightly import NIGHTLY

SOURCE = Path(__file__).parents[1] / "support" / "kernel_cases.cpp"
AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
FLAGS = {  # of the processor, which are also the compiler's
    "AVX2": ("avx2", "fma"),
    "AVX-512": ("fma", *AVX512),
    "AVX-512 BF16": ("fma", *AVX512, "avx512_bf16"),
}
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
OPTIONS = ("-std=c++17", "-O1", "-g", "-fopenmp", "-ffp-contract=fast", *SANITIZERS)  # torch.compile has no -O1


def processor_flags() -> set[str]:
    cpus = Path("/proc/cpuinfo")
    found = re.search(r"^flags\s*: (.+)$", cpus.read_text(), re.M) if cpus.exists() else None
    return {*found[1].split()} if found else set()


@pytest.mark.skipif(not NIGHTLY, reason="builds for a minute: nightly only")
@pytest.mark.parametrize("vectors", FLAGS)
def test_kernels_stay_in_their_memory_and_are_right(vectors, tmp_path):
    """Blocks of exactly the needed size, strides of all layouts, partial blocks, rings, and spans without keys."""
    missing = {*FLAGS[vectors]} - processor_flags()
    if missing:
        pytest.skip(f"this processor lacks {', '.join(sorted(missing))}")
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    machine = [f"-m{flag.replace('_', '')}" for flag in FLAGS[vectors]]
    program = tmp_path / "kernel_cases"
    subprocess.run(["g++", *OPTIONS, *machine, SOURCE, "-o", program], check=True)
    seed = Random().randrange(2**31)
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}  # OpenMP keeps its threads
    ran = subprocess.run([program, str(seed), "60"], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, f"seed {seed}: {ran.stdout[-2000:]} {ran.stderr[-4000:]}"
    assert ran.stdout == "60 cases of each kernel and dtype\n"
