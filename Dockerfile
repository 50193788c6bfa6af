# make demo in a container:
#   docker build -t clean-diffusion-rl .
#   docker run --rm -v "$PWD/runs:/work/runs" clean-diffusion-rl                     # or: ... make demo METHOD=vmpo
# With CUDA: the public index's torch, and a host with NVIDIA's container toolkit
#   docker build --build-arg TORCH_INDEX= -t clean-diffusion-rl:cuda .
#   docker run --rm --gpus all -v "$PWD/runs:/work/runs" clean-diffusion-rl:cuda
# Not built where it was written: there was no docker daemon.
FROM python:3.11-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /work
COPY requirements.txt Makefile ./
RUN PIP_EXTRA_INDEX_URL=$TORCH_INDEX PIP_NO_CACHE_DIR=1 make .venv/installed
COPY . .
# in case a checkout is newer than the image's packages: they are those of this requirements.txt
RUN touch .venv/installed
CMD ["make", "demo"]
