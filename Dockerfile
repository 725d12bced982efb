# cosmos_mcore on NVIDIA's NGC PyTorch image, which carries torch, Transformer Engine, DALI and NCCL.
#
#   docker build -t cosmos_mcore .
#   docker build -t cosmos_mcore --build-arg NGC_TAG=26.02-py3 .
#
# See docs/container.md for how to run it with docker, enroot and apptainer.
ARG NGC_TAG=26.06-py3
FROM nvcr.io/nvidia/pytorch:${NGC_TAG}

# What the image pins stays: pip may not replace torch, Transformer Engine, DALI or anything else it came with.
ENV PIP_CONSTRAINT=/etc/pip/constraint.txt \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    OMP_NUM_THREADS=1

WORKDIR /opt/cosmos_mcore

# The packages first, without torch: they change less often than the code.
COPY pyproject.toml README.md LICENSE ./
COPY cosmos_mcore/__init__.py cosmos_mcore/__init__.py
COPY scripts/container/install.sh scripts/container/install.sh
RUN scripts/container/install.sh packages

COPY cosmos_mcore cosmos_mcore
COPY conf conf
COPY examples examples
COPY scripts scripts
RUN scripts/container/install.sh project && useradd --create-home --uid 1001 cosmos
USER 1001
WORKDIR /workspace

# Smoke test: the image's own torch, the imports, and the checks of one config's values.
RUN /opt/cosmos_mcore/scripts/container/install.sh test
