# NOT YET BUILT: written without access to a registry, so neither the image nor the installation below was ever tried.
#
#   docker build --build-arg BASE_IMAGE=REGISTRY/IMAGE --build-arg BASE_DIGEST=sha256:... -t nemo_opd .
#
# Both arguments are required and have no default: an image is named by its digest, and only you can look one up. Choose
# one that brings CUDA, torch and Transformer Engine built for each other (see the `gpu` extra in pyproject.toml for
# the versions that fit), and a Python of 3.11 or 3.12. What the image has of these is kept: nothing below may replace it,
# and the build fails when torch changed.
#
# Two environments: the image's own for trainer, teacher and command line, and /opt/servers for vLLM, which pins a torch of
# its own. A run starts its servers with the latter (NEMO_OPD_SERVER_PYTHON).
ARG BASE_IMAGE
ARG BASE_DIGEST
FROM ${BASE_IMAGE}@${BASE_DIGEST}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /opt/nemo_opd
COPY pyproject.toml README.md LICENSE ./
COPY docker/image_packages.py docker/image_packages.py

# The image's own GPU packages become constraints; our requirements are installed around them, our package without any.
RUN python3 docker/image_packages.py constraints > /tmp/constraints.txt \
    && python3 docker/image_packages.py requirements pyproject.toml > /tmp/requirements.txt \
    && python3 -m pip install --constraint /tmp/constraints.txt --requirement /tmp/requirements.txt
COPY nemo_opd nemo_opd
RUN python3 -m pip install --no-deps . \
    && python3 docker/image_packages.py constraints | diff /tmp/constraints.txt - \
    && python3 -c "import torch, megatron.core, nemo_opd"

RUN python3 -m venv /opt/servers \
    && python3 docker/image_packages.py servers pyproject.toml > /tmp/servers.txt \
    && /opt/servers/bin/python -m pip install --requirement /tmp/servers.txt \
    && /opt/servers/bin/python -m pip install --no-deps . \
    && /opt/servers/bin/python -c "import vllm, nemo_opd.engines.vllm.server"
ENV NEMO_OPD_SERVER_PYTHON=/opt/servers/bin/python

COPY recipes recipes
COPY slurm slurm
RUN useradd --create-home --uid 10001 opd
# By number: a container runtime that maps users may not know the name.
USER 10001
WORKDIR /home/opd
ENTRYPOINT ["nemo-opd"]
CMD ["--help"]
