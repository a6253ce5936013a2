# The gateway in front of your own backends, with any store and index; no torch. With the embedded engine:
#   docker build --build-arg EXTRAS=embedded,redis -t thinkgate .
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS build
ARG EXTRAS="redis,kv-events"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /venv
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY gateway gateway
COPY router router
COPY budget budget
COPY kernels kernels
RUN /venv/bin/pip install -c constraints.txt ".${EXTRAS:+[${EXTRAS}]}"

FROM python:${PYTHON_VERSION}-slim
LABEL org.opencontainers.image.title="thinkgate" \
      org.opencontainers.image.description="OpenAI-compatible gateway that puts thinking on a budget" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 thinkgate \
    && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin thinkgate
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /home/thinkgate
USER 10001:10001
EXPOSE 8080 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ.get('THINKGATE_SERVER__PORT', '8080') + '/health/live', timeout=2)"]
ENTRYPOINT ["thinkgate"]
# Binding every address is refused unless the file has `keys`.
CMD ["serve", "--config", "/etc/thinkgate/thinkgate.yaml", "--host", "0.0.0.0"]
