# One image for CPU and NVIDIA: with a driver and `--gpus all`, torch's default build uses the GPU. An image for CPUs
# alone is gigabytes smaller: --build-arg TORCH_INDEX=<an index that has torch's CPU builds>.
FROM python:3.11-slim

# libgomp: numba's OpenMP layer; without it kernels fall back to a much slower thread pool.
# gcc: triton, which builds the GPU kernels, compiles their launchers with it.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 gcc libc6-dev && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home onebase
WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE ./
ARG TORCH_INDEX=
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -c constraints.txt torch
COPY adapters adapters
COPY engine engine
COPY contract contract
COPY server server
COPY training training
COPY onebase onebase
RUN pip install --no-cache-dir -c constraints.txt '.[otel]'

USER onebase
# Models and compiled kernels outlive the container in the cache's volume.
ENV ONEBASE_HOME=/home/onebase/data \
    ONEBASE_CACHE=/home/onebase/cache \
    HF_HOME=/home/onebase/cache/huggingface \
    TRITON_CACHE_DIR=/home/onebase/cache/triton
# Created here so that named volumes mounted on them belong to the user.
RUN mkdir -p /home/onebase/cache /home/onebase/data /home/onebase/adapters
VOLUME ["/home/onebase/cache", "/home/onebase/data", "/home/onebase/adapters"]
EXPOSE 8000
# The first start fetches the base and compiles for this machine.
HEALTHCHECK --start-period=10m --interval=15s --timeout=5s CMD ["python", "-c", "import httpx; httpx.get('http://127.0.0.1:8000/health').raise_for_status()"]
# Requests get 30 seconds to finish when it is told to stop: `docker stop --time 40`.
ENTRYPOINT ["onebase"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000", "--adapter-root", "/home/onebase/adapters"]
