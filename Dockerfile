# CUDA-capable as it is: the torch wheels on PyPI bring the CUDA libraries, and the NVIDIA container toolkit lends the
# host's driver to whatever asks by the two NVIDIA_* variables. Without a GPU the same image runs on the CPU.
#
#   docker build -t lape-vit .
#   docker run --rm lape-vit -m benchmarks.demo
#   docker run --rm --gpus all --ipc=host -v /data/imagenet:/data:ro -v "$PWD/runs:/app/runs" lape-vit \
#       main.py --model deit_tiny_patch16_224 --join-type LaPE --data-path /data --output_dir runs/lape
#   docker run --rm --gpus all --ipc=host lape-vit -m torch.distributed.run --nproc_per_node=2 main.py ...
#
# --ipc=host gives the data loader's workers shared memory; a mounted output folder must be writable by user 1000.
FROM python:3.12-slim

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore

WORKDIR /app
COPY requirements.txt .
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* # for --compile
RUN python -m pip install -r requirements.txt

RUN useradd --create-home --uid 1000 lape && chown lape /app
COPY --chown=lape . .
USER lape

ENTRYPOINT ["python"]
CMD ["main.py", "--help"]
