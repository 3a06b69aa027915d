# The image of dskd. `make image` builds it; docker/README.md says how it is used.
# The base must have the CUDA version that the torch of docker/requirements-torch.txt is built for (13.0), since DeepSpeed's
# operators are compiled with it. On a base without nvcc they are left out and pip takes a torch by its own rules.
ARG BASE_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04
# The same distribution without CUDA's compiler.
ARG RUNTIME_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04

FROM ${BASE_IMAGE} AS packages
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked --mount=type=cache,target=/var/lib/apt/lists,sharing=locked \
    apt-get update && apt-get install --yes --no-install-recommends python3-dev python3-venv
# /opt/dskd is what is shipped; pip and the other tools of the build are beside it in /opt/tools.
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,source=docker/requirements-build.txt,target=/requirements-build.txt \
    python3 -m venv /opt/tools && python3 -m venv --without-pip /opt/dskd \
    && /opt/tools/bin/pip install --require-hashes --no-deps --requirement /requirements-build.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,source=docker/requirements-torch.txt,target=/requirements-torch.txt \
    if command -v nvcc; then set -- --require-hashes --no-deps --requirement /requirements-torch.txt; \
    else sed '/^ /d; s/[ ;\\].*//' /requirements-torch.txt >/versions.txt; set -- --constraint /versions.txt torch; fi \
    && /opt/tools/bin/pip --python /opt/dskd/bin/python install "$@" \
    && /opt/dskd/bin/python -c "import torch; print(torch.version.cuda or '')" >/opt/dskd/cuda-version
# Compute capabilities to compile DeepSpeed's operators for; its CPU Adam is compiled for the CPU of this machine. pip's cache
# must stay out of it: it would hand over a DeepSpeed that was built without them.
ARG TORCH_CUDA_ARCH_LIST="8.0;8.6;8.9;9.0;10.0;12.0"
RUN --mount=type=bind,source=docker/requirements.txt,target=/requirements.txt \
    if command -v nvcc; then export DS_ACCELERATOR=cuda DS_BUILD_FUSED_ADAM=1 DS_BUILD_CPU_ADAM=1; fi \
    && /opt/tools/bin/pip --python /opt/dskd/bin/python install --require-hashes --no-deps --no-build-isolation \
    --no-cache-dir --requirement /requirements.txt \
    && if command -v nvcc; then \
    ls /opt/dskd/lib/python3*/site-packages/deepspeed/ops/adam/cpu_adam_op*.so \
    /opt/dskd/lib/python3*/site-packages/deepspeed/ops/adam/fused_adam_op*.so; fi

# dskd itself, apart from the packages: a change of its source copies and installs nothing but its own few files.
FROM packages AS wheel
COPY pyproject.toml README.md /source/
COPY jobs /source/jobs
COPY slurm/clusters /source/slurm/clusters
COPY dskd /source/dskd
RUN /opt/tools/bin/pip wheel --no-deps --no-build-isolation --no-cache-dir --wheel-dir /wheel /source \
    && /opt/tools/bin/pip --python /opt/dskd/bin/python install --no-deps --no-index --no-cache-dir --root /install /wheel/*.whl

FROM ${RUNTIME_IMAGE}
# libibverbs: NCCL loads it where there is InfiniBand. gcc: Triton compiles its launcher, and torch.compile its own, with it
# and Python's headers at first use; without them losses on a GPU take the slow way.
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked --mount=type=cache,target=/var/lib/apt/lists,sharing=locked \
    apt-get update && apt-get install --yes --no-install-recommends \
    gcc ibverbs-providers libc6-dev libibverbs1 python3 python3-dev tini
COPY --from=packages /opt/dskd /opt/dskd
COPY --from=wheel /install /
COPY docker/entrypoint.py /opt/dskd/
COPY jobs /opt/dskd/jobs
RUN --mount=type=bind,from=packages,source=/opt/tools,target=/opt/tools \
    --mount=type=bind,source=docker/sbom.py,target=/sbom.py \
    /opt/tools/bin/pip --python /opt/dskd/bin/python check \
    && /opt/tools/bin/python /sbom.py /opt/dskd >/opt/dskd/sbom.cdx.json
# Libraries keep caches in HOME, which the user of `--user` need not have.
ENV PATH=/opt/dskd/bin:$PATH \
    HOME=/tmp \
    HF_HUB_OFFLINE=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONNOUSERSITE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1
ARG VERSION=unknown
ARG REVISION=unknown
ENV DSKD_REVISION=${REVISION}
LABEL org.opencontainers.image.title="dskd" \
    org.opencontainers.image.description="White-box distillation of large language models across vocabularies" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
USER 1000:1000
ENTRYPOINT ["/usr/bin/tini", "-s", "--", "/opt/dskd/bin/python", "/opt/dskd/entrypoint.py"]
CMD ["--help"]
