# One image for every part of a federation: SuperLink, server app, clients and the command `fedmask`.
# docker-compose.yml says which part a container is. Build arguments:
#   TORCH_INDEX      where torch comes from; the default holds builds for CPUs (200 MB instead of several GB)
#   PIP_FIND_LINKS   a page or folder with wheels of your own; torch is then looked for there and on pip's index
#   PIP_INDEX_URL    another package index than pip's own
#   EXTRAS           demo: with the bundled model and texts; fast: without them, for models that are mounted
ARG PYTHON=3.11.14

# The project's own code, with what `pip install` makes of it.
FROM python:${PYTHON}-slim AS code
ARG PIP_FIND_LINKS=
ARG PIP_INDEX_URL=
# For what pip installs and builds with: no option reaches the latter (newer pips know the second name).
ENV PIP_CONSTRAINT=/src/constraints.txt PIP_BUILD_CONSTRAINT=/src/constraints.txt
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY fedmask fedmask
COPY clients clients
COPY server server
COPY experiments experiments
RUN [ -n "$PIP_INDEX_URL" ] || unset PIP_INDEX_URL; pip install --no-cache-dir --no-deps --target /code . && \
    sed -i '1s|.*|#!/venv/bin/python|' /code/bin/fedmask

FROM python:${PYTHON}-slim
LABEL org.opencontainers.image.title=fedmask org.opencontainers.image.licenses=Apache-2.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG PIP_FIND_LINKS=
ARG PIP_INDEX_URL=
ARG EXTRAS=demo
# The dependencies before the code, so that a change of code does not install them again: first torch by itself,
# because its index is asked for nothing else.
COPY constraints.txt pyproject.toml LICENSE /src/
RUN [ -n "$PIP_INDEX_URL" ] || unset PIP_INDEX_URL; \
    export PIP_PYTHON=/venv/bin/python PIP_NO_CACHE_DIR=1 && python -m venv --without-pip /venv && \
    torch=$(sed -n 's/^torch==.*/&/p' /src/constraints.txt) && \
    if [ -n "$PIP_FIND_LINKS" ] || [ -z "$TORCH_INDEX" ]; then pip install --no-compile --no-deps "$torch"; \
    else pip install --no-compile --no-deps --index-url "$TORCH_INDEX" "$torch"; fi && \
    cd /venv/lib/python3*/site-packages/torch && rm -rf include test share lib/*_test.so && \
    find bin -type f ! -name torch_shm_manager -delete
# Left out: pip, and uv, Flower's installer of packages at run time, which nothing here may do; what the packages of the
# demo's model and texts require for code of theirs that is never run; Arrow's network clients; tests.
# Bytecode is written of what a federation imports: the file system is read-only later.
COPY experiments/imports.py /src/
RUN [ -n "$PIP_INDEX_URL" ] || unset PIP_INDEX_URL; \
    export PIP_PYTHON=/venv/bin/python PIP_NO_CACHE_DIR=1 && cp -r /src /build && cd /build && \
    export PIP_CONSTRAINT=/src/constraints.txt PIP_BUILD_CONSTRAINT=/src/constraints.txt && \
    for package in fedmask clients server experiments; do mkdir $package && touch $package/__init__.py; done && \
    touch README.md && pip install --no-compile ".[$EXTRAS]" && \
    pip uninstall -y fedmask sentence-transformers nltk && \
    rm -f /venv/bin/uv /venv/bin/uvx && cd /venv/lib/python3*/site-packages && \
    rm -rf pyarrow/include pyarrow/src pyarrow/*arrow_flight* pyarrow/*arrow_python_flight* pyarrow/_flight.* \
    pyarrow/libarrow_s3* pyarrow/_s3fs.* && \
    find . -type d \( -name tests -o -name test \) ! -path './torch/*' ! -path './numba/*' -prune -exec rm -rf {} + && \
    echo /code > fedmask.pth && HOME=/tmp /venv/bin/python /src/imports.py && rm -rf /build /tmp/* ~/.cache \
    /usr/local/bin/pip* /usr/local/lib/python3*/ensurepip /usr/local/lib/python3*/site-packages/pip*
# Nobody is called out to, nothing is installed at run time, one thread a process unless the run says otherwise.
ENV PATH=/code/clients/bin:/code/bin:/venv/bin:$PATH PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 HOME=/tmp \
    FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 \
    HF_HUB_OFFLINE=1 HF_HOME=/models TOKENIZERS_PARALLELISM=false \
    FLWR_HOME=/tmp MPLCONFIGDIR=/tmp NUMBA_CACHE_DIR=/tmp FEDMASK_CACHE=/state/cache
# Folders that anybody may write to, as /tmp: volumes take over their mode, whatever user a container runs as.
RUN mkdir -m 1777 /state /runs /models && mkdir /data && \
    mkdir -p /keys/public /keys/link /keys/nodes && chmod 1777 /keys/*
COPY --from=code /code /code
USER 1000:1000
WORKDIR /
CMD ["fedmask", "--help"]
