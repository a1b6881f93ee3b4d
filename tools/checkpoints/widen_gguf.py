"""Rewrite a GGUF file with all matrices in one dtype, so that llama.cpp runs the weights that tools/convert writes.

    python -m tools.checkpoints.widen_gguf model-q4_1.gguf model-bf16.gguf --dtype bfloat16

A quantised matrix is dequantised and rounded once, as in tools/convert. Vectors become float32, as llama.cpp
requires. All metadata is copied, except for the entries that name the quantisation. Needs pop's `demo` extra.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from pop.errors import InputError
from pop.system.files import replaced
from tools.common import exit_status
from tools.convert.gguf import GGUFFile


def widen(source: Path, target: Path, dtype: str) -> None:
    """Write the contents of `source` to `target`, with matrices in `dtype`: bfloat16, float16 or float32."""
    if not source.is_file():
        raise InputError(f"{source} does not exist; give a GGUF file")
    file = GGUFFile(source)  # raises if the package gguf is missing
    import gguf

    kinds = gguf.GGMLQuantizationType
    wide, name = {
        "bfloat16": (kinds.BF16, gguf.LlamaFileType.MOSTLY_BF16),
        "float16": (kinds.F16, gguf.LlamaFileType.MOSTLY_F16),
        "float32": (kinds.F32, gguf.LlamaFileType.ALL_F32),
    }[dtype]
    with replaced(target, "the GGUF file", InputError) as draft, file.sound():
        writer = gguf.GGUFWriter(draft, file.reader.fields["general.architecture"].contents())
        for key, field in file.reader.fields.items():
            if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
                continue
            item = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=item)
        writer.add_file_type(name)
        for tensor in file.reader.tensors:
            values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            kind = wide if values.ndim > 1 else kinds.F32
            if kind == kinds.F32:
                writer.add_tensor(tensor.name, values)
            else:
                writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.checkpoints.widen_gguf", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    args = parser.parse_args()
    return exit_status("widen_gguf", lambda: widen(args.source, args.target, args.dtype))


if __name__ == "__main__":
    sys.exit(main())
