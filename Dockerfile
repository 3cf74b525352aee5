# A CPU image by default; a CUDA one by build arguments (docs/container.md has both commands).
#
#   BASE_IMAGE    what the server runs on: Debian 12 with glibc and apt
#   BUILD_IMAGE   what the kernels are compiled on: the same, or an image with nvcc for CUDA=ON
#   TORCH         pip's arguments for torch: the CPU build, or the CUDA build that fits the driver

ARG BASE_IMAGE=debian:bookworm-slim
ARG BUILD_IMAGE=${BASE_IMAGE}

FROM ${BUILD_IMAGE} AS build
ARG TORCH=torch==2.13.0
ARG CUDA=OFF
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/halfbyte
# The compiled bytecode stays: on a read-only file system it would be made anew at every start.
# torch before the sources: a change of the code does not fetch it again.
# hadolint ignore=SC2086,DL3059
RUN /opt/halfbyte/bin/pip install --no-cache-dir ${TORCH}
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY csrc csrc
COPY quant quant
COPY server server
RUN /opt/halfbyte/bin/pip install --no-cache-dir --constraint constraints.txt \
        --config-settings=cmake.define.HALFBYTE_CUDA=${CUDA} . \
    && /opt/halfbyte/bin/pip uninstall --yes pip setuptools

FROM ${BASE_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 libstdc++6 python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin halfbyte
COPY --from=build /opt/halfbyte /opt/halfbyte
ENV PATH=/opt/halfbyte/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    HALFBYTE_HOST=0.0.0.0 \
    HALFBYTE_PORT=8000
USER 10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['HALFBYTE_PORT'] + '/livez', timeout=2)"]
ENTRYPOINT ["halfbyte"]
CMD ["serve"]
