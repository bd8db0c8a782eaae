# CPU:   docker build -t dsv3 .
# CUDA:  docker build -t dsv3 --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# Run:   docker run --rm -it -v $PWD/runs:/dsv3/runs dsv3        (CUDA: with --gpus all)
# Nobody has built this image yet: there was no Docker daemon where it was written.
FROM python:3.11-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install -y --no-install-recommends bubblewrap g++ git make && rm -rf /var/lib/apt/lists/*
WORKDIR /dsv3
COPY pyproject.toml requirements.txt ./
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" torch==2.13.0
COPY . .
RUN pip install --no-cache-dir --constraint requirements.txt --editable .
CMD ["python", "train.py"]
