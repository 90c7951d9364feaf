# One image for CPU serving and training. With an NVIDIA driver and `--gpus all`, torch's default build uses the GPU.
FROM python:3.11-slim

# numba's OpenMP layer needs the system's libgomp; without it kernels fall back to a much slower thread pool.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home onebase
WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir -c constraints.txt torch
COPY adapters adapters
COPY server server
COPY training training
RUN pip install --no-cache-dir -c constraints.txt .

USER onebase
ENV ONEBASE_CACHE=/home/onebase/cache ONEBASE_HOME=/home/onebase/data
# Created here so that named volumes mounted on them belong to the user.
RUN mkdir -p /home/onebase/cache /home/onebase/data /home/onebase/adapters
VOLUME ["/home/onebase/cache", "/home/onebase/data", "/home/onebase/adapters"]
EXPOSE 8000
HEALTHCHECK --start-period=120s --interval=15s CMD ["python", "-c", "import httpx; httpx.get('http://127.0.0.1:8000/health').raise_for_status()"]
ENTRYPOINT ["onebase"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000", "--adapter-root", "/home/onebase/adapters"]
