# NOT BUILT YET: written from the documentation of its parts, on a machine without docker. Expect to mend it.
#
# The environment of a cluster, on NVIDIA's PyTorch image (nvidia/pytorch, of 2026 or later: Python 3.12 with
# PyTorch, NCCL, Transformer Engine, flash-attn, DALI and apex built for each other):
#
#   docker build --build-arg BASE_IMAGE=<that image> --build-arg GIT_COMMIT=$(git rev-parse HEAD) -t internvlx .
#   docker run --rm --gpus all --ipc host internvlx make demo
#   docker run --rm --gpus all --ipc host internvlx make test
ARG BASE_IMAGE
FROM ${BASE_IMAGE}

# 1: build apex, where the base image lacks it and fused gradient accumulation is wanted. What the package
# index calls apex is another project, so it comes from a checkout.
ARG APEX=0
ARG APEX_SOURCE=
ARG USER_ID=1000
# The repository itself stays outside; this is what runs in MLflow are marked with.
ARG GIT_COMMIT=

WORKDIR /opt/internvlx
COPY setup.py constraints.txt README.md ./

# The base image's builds are kept: the versions that we pin would replace them by others, without the
# vendor's patches, so everything that belongs to them is left out.
RUN python -m venv --system-site-packages .venv \
 && grep -viE '^(torch|torchvision|triton|nvidia-|cuda-|numpy|transformer)' constraints.txt > /tmp/ours.txt \
 && .venv/bin/python -c 'import re; text = open("setup.py").read(); \
names = re.findall(r"^    \"([A-Za-z0-9_.-]+[^\"]*)\"", text, re.M); \
skip = ("torch", "nvidia-dali", "numpy"); \
print("\n".join(n for n in names if not n.startswith(skip)))' > /tmp/wanted.txt \
 && PIP_CONSTRAINT= .venv/bin/python -m pip install --no-cache-dir -c /tmp/ours.txt -r /tmp/wanted.txt \
      pytest pytest-xdist hypothesis ruff mypy scikit-image scikit-learn \
 && .venv/bin/python -c 'import torch, transformer_engine.pytorch, flash_attn, nvidia.dali' \
 || { echo "the base image lacks a part, or pip failed: see above" >&2; exit 1; }

RUN if [ "$APEX" = 1 ] && ! .venv/bin/python -c 'import apex' 2>/dev/null; then \
      APEX_CPP_EXT=1 APEX_CUDA_EXT=1 .venv/bin/python -m pip install --no-cache-dir --no-build-isolation \
        "${APEX_SOURCE:?APEX=1 needs APEX_SOURCE, a git URL of NVIDIA apex}"; \
    fi

COPY . .
RUN if [ -n "$GIT_COMMIT" ]; then echo "$GIT_COMMIT" > .git_commit; fi
RUN .venv/bin/python -m pip install --no-cache-dir --no-deps --no-build-isolation -e . \
 && touch .venv/.installed \
 && useradd --create-home --uid "$USER_ID" trainer 2>/dev/null || useradd --create-home trainer; \
    chown -R trainer /opt/internvlx

# Not root: checkpoints on shared file systems belong to a person.
USER trainer
ENV PATH=/opt/internvlx/.venv/bin:$PATH
CMD ["make", "test"]
