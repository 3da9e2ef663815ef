# The operator's image, small because nothing in it needs torch. Build it from the repository's root, on any base that
# has Python 3.11 or later:
#
#     docker build -f images/operator.Dockerfile -t lockstep/operator .
ARG BASE=python:3.11-slim

FROM ${BASE} AS installer
ARG PIP_INDEX_URL
COPY images/installer.txt /tmp/installer.txt
RUN python3 -m venv /opt/installer \
    && /opt/installer/bin/pip install --quiet --no-cache-dir --require-hashes -r /tmp/installer.txt

FROM installer AS wheel
COPY LICENSE README.md pyproject.toml /src/
COPY operator /src/operator
COPY runtime /src/runtime
RUN cd /src && /opt/installer/bin/hatchling build -t wheel -d /dist

FROM ${BASE}
# Bytecode is compiled here, once: at run time the root is read-only.
ENV PATH=/opt/lockstep/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp
ARG UV_DEFAULT_INDEX
RUN --mount=type=bind,from=installer,source=/opt/installer,target=/opt/installer \
    --mount=type=bind,source=requirements/operator.txt,target=/tmp/requirements.txt \
    export UV_NO_CACHE=true UV_SYSTEM_CERTS=true \
    && /opt/installer/bin/uv venv --quiet --python python3 /opt/lockstep \
    && /opt/installer/bin/uv pip install --python /opt/lockstep --compile-bytecode --require-hashes -r /tmp/requirements.txt
RUN --mount=type=bind,from=installer,source=/opt/installer,target=/opt/installer \
    --mount=type=bind,from=wheel,source=/dist,target=/dist \
    /opt/installer/bin/uv pip install --quiet --no-cache --python /opt/lockstep --compile-bytecode --no-deps /dist/*.whl
USER 65532:65532
ENTRYPOINT ["lockstep-operator"]
