"""Registers, stack and shared memory of pop's Triton kernels, on GPUs of several kinds. It needs no GPU.

    python -m tools.gpu_report.registers

Triton compiles the kernels, and the tools that come with it read what they need (`pip install triton`). The exit status
is 1 if a kernel spills: it has no registers for some numbers, and keeps them in its stack, which is slow memory.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from pop.backends import span_attention
from pop.errors import MissingExtra
from tools.common import exit_status, table

CAPABILITIES = (80, 86, 90, 100)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # as Triton calls them
HEADS = ((64, 3), (128, 4), (256, 2))  # widths, and query heads of a group: SmolLM2, Llama-3.1, Gemma-3
TOKENS = (1, 96)
SLOTS = 8192
PROCESSORS = 132  # of the GPU
LEAST_SPILL = 16  # bytes of stack: more than one number of a thread


class Need(NamedTuple):
    """What a program of a kernel needs."""

    kernel: str
    dtype: str
    width: int  # E
    tokens: int  # T
    capability: int
    registers: int
    stack: int  # bytes
    shared: int  # bytes

    @property
    def spills(self) -> bool:
        return self.stack >= LEAST_SPILL


def needs(capabilities=CAPABILITIES) -> Iterator[Need]:
    """Compile all variants. Raises MissingExtra without Triton."""
    if find_spec("triton") is None:
        raise MissingExtra("the kernels are compiled by Triton; run `pip install triton`")
    from pop.backends import span_attention_triton as kernels

    for dtype, (E, G), T, capability in product(DTYPES, HEADS, TOKENS, capabilities):
        K = 8
        q = torch.empty(1, T, K * G, E, dtype=DTYPES[dtype], device="meta")
        keys = torch.empty(1, SLOTS + 1, K, E, dtype=DTYPES[dtype], device="meta")
        queries, block, parts = span_attention.blocks_of(q, keys, PROCESSORS)
        of_part = {
            "Q": f"*{dtype}", "Keys": f"*{dtype}", "Values": f"*{dtype}", "Spans": "*i32",
            "Averages": "*fp32" if parts > 1 else f"*{dtype}", "LogSums": "*fp32", "scale": "fp32",
        }  # fmt: skip
        combining = {"Averages": "*fp32", "LogSums": "*fp32", "Out": f"*{dtype}"}
        found = compiled(kernels.attention_of_part, of_part, {"G": G, "E": E, "M": queries, "BLOCK": block}, capability)
        yield Need("attention_of_part", dtype, E, T, capability, *found)
        if T == 1:  # the other one's numbers do not depend on T
            found = compiled(kernels.combine_parts, combining, {"E": E, "MOST": span_attention.MOST_PARTS}, capability)
            yield Need("combine_parts", dtype, E, T, capability, *found)


def compiled(kernel, types: dict[str, str], constants: dict[str, int], capability: int) -> tuple[int, int, int]:
    """Registers, bytes of stack and of shared memory of a kernel. Arguments that `types` lacks are int32."""
    import triton
    from triton.backends.compiler import GPUTarget

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    # Memory and strides are multiples of 16, as those of a cache.
    aligned = [name for name in names if signature[name].startswith("*") or name.endswith("_stride")]
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = span_attention.LAUNCH if "M" in constants else {}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [reader, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    return int(registers), int(stack), binary.metadata.shared


def summary(found: list[Need]) -> str:
    """A row for each variant, with registers and shared memory on each kind of GPU."""
    capabilities = sorted({need.capability for need in found})
    rows = [["registers, shared KB", "dtype", "E", "T", *(f"sm_{one}" for one in capabilities)]]
    variants = {}
    for need in found:
        cell = f"{need.registers}, {need.shared / 1024:.0f}" + (f", stack {need.stack}" if need.stack else "")
        variants.setdefault(need[:4], []).append(cell)
    for variant, cells in variants.items():
        rows.append([*map(str, variant), *cells])
    return table(rows, words=(0, 1))


def main() -> int:
    found: list[Need] = []
    status = exit_status("registers", lambda: found.extend(needs()))
    if status == 0:
        print(summary(found))
    return status or int(any(need.spills for need in found))


if __name__ == "__main__":
    sys.exit(main())
