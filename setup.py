"""Package metadata. `constraints.txt` holds the versions that `make setup` installs."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

PACKAGE = "megatron_internvlx"


class BuildWithConstraints(build_py):
    """Copies the versions of the tests into a wheel: `ivlx doctor` compares with them."""

    def run(self) -> None:
        """Build the package, then copy."""
        super().run()
        if not self.editable_mode:  # which reads the checkout's own
            self.copy_file("constraints.txt", str(Path(self.build_lib, PACKAGE, "constraints.txt")))


REQUIRED = [
    "torch>=2.13",
    "torchvision",  # constrained: a free version drags torch along
    "megatron-core>=0.19.2,<0.20",  # brings megatron.training too
    "megatron-energon>=7.4.1,<8",
    "nvidia-dali-cuda130>=2.4; platform_system == 'Linux'",
    "mlflow>=3.17.2,<3.18",  # 3.18.0 cannot be installed
    "transformers>=5.23,<6",
    "tokenizers",
    "safetensors",
    "sentencepiece",
    "protobuf",
    "tensorboard",
    "numpy",
    "pillow",
    "pyarrow",  # Parquet files; MLflow brings it too
    "matplotlib",
    "einops",
    "omegaconf",
    "packaging",
    "pyyaml",
    "psutil",  # Megatron's checkpoint writer
    "starlette",  # the page of ivlx chat; mlflow needs both too
    "uvicorn",
    "tqdm",
]

EXTRAS = {
    # For machines with CUDA only: Megatron prefers Transformer Engine's optimizer, which has no CPU version.
    "gpu": ["transformer-engine[pytorch]>=2.8"],
    # What `transformers serve` needs besides: OpenAI's types of requests, and placement on devices.
    "serve": ["transformers[serving]"],
    "dev": [
        "pytest",
        "pytest-xdist",
        "hypothesis",
        "ruff",
        "mypy",
        "playwright",  # drives an installed Chromium; it brings no browser
        "pre-commit",
        "scikit-image",
        "scikit-learn",
        "uv",
        "nbclient",  # runs the notebook of the quickstart
        "ipykernel",
        "peft",  # what others load our adapters with
    ],
    # For an environment of its own: vLLM wants an older transformers (tools/vllm_env.sh).
    "vllm": ["vllm>=0.32,<0.33"],
    "docs": [
        "mkdocs<2",
        "mkdocs-material",
        "mkdocstrings[python]",
    ],
}

setup(
    name="megatron-internvlx",
    version="0.2.0",
    description="Distributed training of InternVL-X vision-language models on Megatron-Core",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.12,<3.13",
    py_modules=["pretrain_vlm"],
    packages=find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
    entry_points={
        "console_scripts": ["ivlx = megatron_internvlx.commands.ivlx:main"],
        # Read by lmms-eval where it is installed (tools/eval_env.sh).
        "lmms_eval.models": ["internvlx = megatron_internvlx.harness.lmms_eval_model:manifest"],
        "vllm.general_plugins": ["internvlx = megatron_internvlx.serving.plugin:register"],
    },
    cmdclass={"build_py": BuildWithConstraints},
    include_package_data=True,
    package_data={"megatron_internvlx.chat": ["page/*"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
)
