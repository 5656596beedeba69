# megallm on NVIDIA GPUs:   docker build -t megallm .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD/runs:/workspace/runs" megallm pretrain CONFIG.yaml
# Optional libraries, used where they are installed (each compiles for minutes):
#   docker build --build-arg TRANSFORMER_ENGINE=2.9.0 --build-arg FLASH_ATTN=2.8.3 --build-arg APEX=25.09 -t megallm .
# Behind a mirror, docker's own settings (PIP_INDEX_URL and HTTPS_PROXY as build arguments) are honoured.

ARG CUDA=13.0.1
ARG UBUNTU=24.04
FROM nvidia/cuda:${CUDA}-cudnn-devel-ubuntu${UBUNTU} AS base

ARG DEBIAN_FRONTEND=noninteractive
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        bubblewrap build-essential ca-certificates git libibverbs1 ninja-build python3 python3-dev python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*

ARG PIP_INDEX_URL
ENV VIRTUAL_ENV=/opt/megallm \
    PATH=/opt/megallm/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv $VIRTUAL_ENV && pip install --upgrade pip setuptools wheel pybind11 numpy

# torch first and alone: its layer survives changes of megallm.
ARG TORCH=2.13.0
RUN pip install "torch==${TORCH}"

# Optional libraries. Empty means: leave it out. They build against the torch above, so build isolation is off.
ARG TRANSFORMER_ENGINE=
ARG FLASH_ATTN=
ARG APEX=
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0"
ARG MAX_JOBS=8
ENV TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST} \
    MAX_JOBS=${MAX_JOBS} \
    NVTE_FRAMEWORK=pytorch
RUN if [ -n "$TRANSFORMER_ENGINE" ]; then \
        pip install --no-build-isolation "transformer-engine[pytorch]==${TRANSFORMER_ENGINE}"; \
    fi
RUN if [ -n "$FLASH_ATTN" ]; then \
        pip install --no-build-isolation "flash-attn==${FLASH_ATTN}"; \
    fi
# apex has releases as tags of its repository only.
RUN if [ -n "$APEX" ]; then \
        git clone --depth 1 --branch "$APEX" https://github.com/NVIDIA/apex /tmp/apex \
        && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation /tmp/apex \
        && rm -rf /tmp/apex; \
    fi

WORKDIR /workspace
COPY setup.py pyproject.toml README.md LICENSE ./
COPY csrc csrc
COPY megallm megallm
# With build isolation: kenlm has no wheel, and its build wants packages of its own. The torch above satisfies megallm.
RUN pip install ".[gpu,data,rewards]" && rm -rf build && megallm doctor --json > /opt/megallm/doctor.json
COPY examples examples
COPY tools tools
COPY docs docs

# Ranks talk over shared memory and memory-locked buffers: run with --ipc=host --ulimit memlock=-1.
ENTRYPOINT ["megallm"]
CMD ["--help"]
