# Three images from one file:
#   docker build --target gateway -t personaplex-serve-gateway .   gateways, Ray's head, jobs: no torch, no CUDA
#   docker build --target gpu     -t personaplex-serve .           replicas; also runs the whole service alone
#   docker build --target cpu     -t personaplex-serve-cpu .       the whole service without CUDA, for a first look
# CUDA comes with torch's own wheels; the node brings the driver (docker/constraints.txt).
#
# The base is pinned by digest. To move on:
#   docker buildx imagetools inspect python:3.11-slim-bookworm --format '{{.Manifest.Digest}}'
ARG PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

FROM ${PYTHON_IMAGE} AS runtime
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# KubeRay's probes call bash and wget; the codec is the system's libopus. Debian keeps one version of each in a
# release, so that a version here would only break the build when a security fix replaces it.
# hadolint ignore=DL3008,SC2016
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bash libopus0 tini wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 personaplex \
    && useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash personaplex \
    # A login shell, which KubeRay may use for `ray start`, sets PATH anew from here.
    && echo 'export PATH=/opt/personaplex/bin:$PATH' > /etc/profile.d/personaplex.sh
ENV PATH=/opt/personaplex/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
WORKDIR /home/personaplex
EXPOSE 8998

# Dependencies come first and from pinned versions: a change of the source alone adds one small layer to an image.
FROM ${PYTHON_IMAGE} AS dependencies
WORKDIR /src
COPY pyproject.toml ./
COPY docker/install.sh docker/requirements.py docker/constraints.txt docker/

FROM dependencies AS gateway-dependencies
RUN docker/install.sh gateway /opt/personaplex dependencies

FROM dependencies AS gpu-dependencies
RUN docker/install.sh gpu /opt/personaplex dependencies

FROM dependencies AS cpu-dependencies
RUN docker/install.sh cpu /opt/personaplex dependencies

FROM dependencies AS source
COPY README.md LICENSE ./
COPY personaplex personaplex
COPY deployments deployments
COPY loadtest loadtest
COPY k8s/*.py k8s/

FROM runtime AS gateway
COPY --from=gateway-dependencies /opt/personaplex /opt/personaplex
RUN --mount=type=bind,from=source,source=/src,target=/src,rw /src/docker/install.sh gateway /opt/personaplex package
USER 1000:1000
# Inside a cluster, KubeRay's own probes decide; this is for `docker run`.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["wget", "--quiet", "--tries=1", "--output-document=-", "http://localhost:8000/-/healthz"]
ENTRYPOINT ["tini", "--"]
CMD ["ray", "--version"]

FROM runtime AS cpu
COPY --from=cpu-dependencies /opt/personaplex /opt/personaplex
RUN --mount=type=bind,from=source,source=/src,target=/src,rw /src/docker/install.sh cpu /opt/personaplex package
USER 1000:1000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["wget", "--quiet", "--tries=1", "--output-document=-", "http://localhost:8998/healthz"]
ENTRYPOINT ["tini", "--"]
CMD ["python", "-m", "personaplex.server", "--host", "0.0.0.0", "--port", "8998", "--device", "cpu"]

FROM runtime AS gpu
# The one compiler at run time: Triton builds a small launcher for each of its kernels on first use.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=gpu-dependencies /opt/personaplex /opt/personaplex
RUN --mount=type=bind,from=source,source=/src,target=/src,rw /src/docker/install.sh gpu /opt/personaplex package
USER 1000:1000
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s \
    CMD ["wget", "--quiet", "--tries=1", "--output-document=-", "http://localhost:8998/healthz"]
ENTRYPOINT ["tini", "--"]
CMD ["python", "-m", "personaplex.server", "--host", "0.0.0.0", "--port", "8998"]
