# The image of the rank pods. Build it from the repository's root, on any base that has Python 3.11 or later:
#
#     docker build -f images/runtime.Dockerfile -t lockstep/runtime .
#
# The dependencies (torch with CUDA's libraries, 4.7 GB) are one layer and the project's code another above it, so that
# a change of code costs seconds to build, to push and to pull.
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
# Bytecode is compiled here, once: at run time the root is read-only, and importing torch uncompiled takes half a minute.
ENV PATH=/opt/lockstep/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp
ARG UV_DEFAULT_INDEX
RUN --mount=type=bind,from=installer,source=/opt/installer,target=/opt/installer \
    --mount=type=bind,source=requirements/runtime.txt,target=/tmp/requirements.txt \
    export UV_NO_CACHE=true UV_SYSTEM_CERTS=true \
    && /opt/installer/bin/uv venv --quiet --python python3 /opt/lockstep \
    && /opt/installer/bin/uv pip install --python /opt/lockstep --compile-bytecode --require-hashes -r /tmp/requirements.txt \
    && find /opt/lockstep -name '*.a' -delete
RUN --mount=type=bind,from=installer,source=/opt/installer,target=/opt/installer \
    --mount=type=bind,from=wheel,source=/dist,target=/dist \
    /opt/installer/bin/uv pip install --quiet --no-cache --python /opt/lockstep --compile-bytecode --no-deps /dist/*.whl
USER 65532:65532
ENTRYPOINT ["lockstep"]
