# A CPU image by default; a CUDA one by build arguments (docs/container.md has both commands).
#
#   BASE_IMAGE    what the server runs on: Debian 12 with glibc and apt
#   BUILD_IMAGE   what the kernels are compiled on: the same, or an image with nvcc for CUDA=ON
#   TORCH         pip's arguments for torch: the CPU build, or the CUDA build that fits the driver
#
# dependencies -> build     compiles the kernels, makes our own files
#              -> runtime   takes out of the dependencies what only compilers and tests need
# The image is the base and one layer of each: a release replaces the small one.

ARG BASE_IMAGE=debian:bookworm-slim
ARG BUILD_IMAGE=${BASE_IMAGE}

FROM ${BUILD_IMAGE} AS dependencies
ARG TORCH=torch==2.13.0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/halfbyte
# torch comes first and alone, so that nothing else decides which build of it is installed.
# hadolint ignore=SC2086,DL3059
RUN /opt/halfbyte/bin/pip install --no-cache-dir --no-compile ${TORCH}
WORKDIR /src
COPY pyproject.toml ./
RUN /opt/halfbyte/bin/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > constraints.txt \
    && python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt \
    && /opt/halfbyte/bin/pip install --no-cache-dir --no-compile --constraint constraints.txt --requirement requirements.txt

FROM dependencies AS build
ARG CUDA=OFF
COPY README.md LICENSE ./
COPY csrc csrc
COPY quant quant
COPY server server
RUN /opt/halfbyte/bin/pip install --no-cache-dir --no-deps --prefix /opt/own \
        --config-settings=cmake.define.HALFBYTE_CUDA=${CUDA} .

FROM dependencies AS runtime
# Headers, test programs and symbol tables serve who compiles against torch; hf-xet downloads, which HF_HUB_OFFLINE
# forbids. Bytecode is made of what a start imports and of nothing else: a read-only image could not keep it later.
# hadolint ignore=DL3003
RUN /opt/halfbyte/bin/pip uninstall --yes hf-xet pip setuptools \
    && cd /opt/halfbyte/lib/python3*/site-packages \
    && rm -rf torch/bin/protoc* torch/bin/test_* torch/include torch/share torch/test sympy/*/tests sympy/*/*/tests \
    && strip --strip-unneeded torch/lib/libtorch_*.so \
    && /opt/halfbyte/bin/python -m compileall -q anyio fastapi pydantic starlette typer uvicorn \
    && /opt/halfbyte/bin/python -c "import accelerate, jinja2, msgspec, prometheus_client, rich.progress, urllib.request, yaml; from transformers import AutoTokenizer, GenerationMixin, LlamaForCausalLM"

FROM ${BASE_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 libstdc++6 python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin halfbyte
COPY --from=runtime /opt/halfbyte /opt/halfbyte
COPY --from=build /opt/own /opt/halfbyte
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
