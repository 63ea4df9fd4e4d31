# `ov3fast serve` in a container, on CPUs; the kernels are built for every instruction set and chosen at start.
#
#   docker build -t ov3fast .
#   docker run -p 8000:8000 -e OV3FAST_API_KEY=... -v "$PWD/runs/demo:/model:ro" ov3fast /model
FROM python:3.12-slim-bookworm AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY constraints.txt ./
# TORCH_INDEX: the index of PyTorch's CPU builds, which are a tenth of the size of the default ones.
ARG TORCH_INDEX=
RUN python -m venv /app \
    && grep '^torch==' constraints.txt | xargs /app/bin/pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
COPY . .
RUN /app/bin/pip install --no-cache-dir --constraint constraints.txt '.[serve]'

FROM python:3.12-slim-bookworm
RUN useradd --create-home --uid 1000 ov3fast
COPY --from=build /app /app
USER 1000
ENV PATH=/app/bin:$PATH PYTHONUNBUFFERED=1 OV3FAST_CACHE=/home/ov3fast/.cache/ov3fast
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["ov3fast", "serve", "--host", "0.0.0.0"]
