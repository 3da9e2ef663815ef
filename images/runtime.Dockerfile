# The image of the rank pods. Build it from the repository's root, on any base that has Python 3.11 or later:
#
#     docker build -f images/runtime.Dockerfile -t lockstep/runtime .
#
# The dependencies (torch with CUDA's libraries, 5 GB) are one layer and the project's code another above it, so that
# a change of code costs seconds to build, to push and to pull.
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
# Bytecode is compiled here, once: at run time the root is read-only, and importing torch uncompiled takes half a minute.
# It is never compared with its source, which spares some thousand file accesses at every start.
ENV PATH=/opt/lockstep/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp
RUN --mount=type=bind,source=images/installer.txt,target=/tmp/installer.txt \
    --mount=type=bind,source=requirements/runtime.txt,target=/tmp/requirements.txt \
    export UV_NO_CACHE=true UV_SYSTEM_CERTS=true PYC_INVALIDATION_MODE=UNCHECKED_HASH \
    && python3 -m venv /tmp/installer \
    && /tmp/installer/bin/pip install --quiet --no-cache-dir --require-hashes -r /tmp/installer.txt \
    && /tmp/installer/bin/uv venv --quiet --python python3 /opt/lockstep \
    && /tmp/installer/bin/uv pip install --python /opt/lockstep --compile-bytecode --require-hashes -r /tmp/requirements.txt \
    && find /opt/lockstep -name '*.a' -delete && rm -rf /tmp/installer
# NCCL loads the RDMA libraries when it meets InfiniBand or RoCE; without them it takes TCP, and says nothing. Triton
# builds its bridge to the GPU's driver, which includes Python.h, when it is first used, and the kernels of CPUs are
# compiled below; without a C compiler attention goes sequence by sequence.
RUN headers="$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')" \
    && apt-get update --quiet=2 \
    && apt-get install --quiet=2 --yes --no-install-recommends libibverbs1 ibverbs-providers librdmacm1 gcc libc6-dev \
       $(test -e "$headers/Python.h" || echo python3-dev) \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -c "import ctypes; ctypes.CDLL('libibverbs.so.1'); ctypes.CDLL('librdmacm.so.1')" \
    && echo '#include <Python.h>' | gcc -E -I "$headers" - > /dev/null
# The same virtual environment, with nothing in it but the project.
COPY --from=code /opt/lockstep /opt/lockstep
RUN python -m lockstep_runtime.layers.native.library
# A model of 3 MB, for `helm test` to break.
COPY examples/tiny-chat /opt/lockstep/share/tiny-chat
# The name spares libraries that ask for it a look into /etc/passwd, which knows no such user.
ENV USER=lockstep
# What NVIDIA's container toolkit mounts: the driver's libraries for computing, and nvidia-smi with NVML.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:65532
ENTRYPOINT ["lockstep"]
