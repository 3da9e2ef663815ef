# The operator's image, small because nothing in it needs torch. Build it from the repository's root, on any base that
# has Python 3.11 or later:
#
#     docker build -f images/operator.Dockerfile -t lockstep/operator .
ARG BASE=python:3.11-slim

FROM ${BASE} AS code
COPY images/installer.txt /tmp/installer.txt
RUN python3 -m venv /opt/installer \
    && /opt/installer/bin/pip install --quiet --no-cache-dir --require-hashes -r /tmp/installer.txt \
    && /opt/installer/bin/uv venv --quiet --python python3 /opt/lockstep
COPY LICENSE README.md pyproject.toml /src/
COPY docs/troubleshooting.md /src/docs/
COPY operator /src/operator
COPY runtime /src/runtime
RUN cd /src && /opt/installer/bin/hatchling build -t wheel -d /dist \
    && PYC_INVALIDATION_MODE=UNCHECKED_HASH /opt/installer/bin/uv pip install --quiet --no-cache --offline --no-deps \
       --compile-bytecode --python /opt/lockstep /dist/*.whl

FROM ${BASE}
# Bytecode is compiled here, once: at run time the root is read-only.
ENV PATH=/opt/lockstep/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp
RUN --mount=type=bind,source=images/installer.txt,target=/tmp/installer.txt \
    --mount=type=bind,source=requirements/operator.txt,target=/tmp/requirements.txt \
    export UV_NO_CACHE=true UV_SYSTEM_CERTS=true PYC_INVALIDATION_MODE=UNCHECKED_HASH \
    && python3 -m venv /tmp/installer \
    && /tmp/installer/bin/pip install --quiet --no-cache-dir --require-hashes -r /tmp/installer.txt \
    && /tmp/installer/bin/uv venv --quiet --python python3 /opt/lockstep \
    && /tmp/installer/bin/uv pip install --python /opt/lockstep --compile-bytecode --require-hashes -r /tmp/requirements.txt \
    && rm -rf /tmp/installer
# The same virtual environment, with nothing in it but the project.
COPY --from=code /opt/lockstep /opt/lockstep
# The name spares libraries that ask for it a look into /etc/passwd, which knows no such user.
ENV USER=lockstep
USER 65532:65532
ENTRYPOINT ["lockstep-operator"]
