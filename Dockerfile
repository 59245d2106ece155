# docker build -t lgp .
# The default torch runs on the CPU and on CUDA, and takes about 5 GB. For a smaller image, which runs on the CPU alone,
# give the address of PyTorch's index of CPU builds: docker build -t lgp:cpu --build-arg TORCH_INDEX=ADDRESS .
# A project in ./digits:
#   docker run --rm -it -v "$PWD/digits:/project" lgp bash -c "lgp init && dvc repro"
#   docker run --rm -it --gpus all --shm-size 8g -v "$PWD/digits:/project" lgp dvc repro
# It has not been built by its authors yet.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# empty: pip's own index, whose torch brings CUDA
ARG TORCH_INDEX=""

# git: provenance and `dvc exp`; procps: `ps`, by which dvc.yaml finds the `lgp` beside the Python that runs DVC
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git procps \
    && rm -rf /var/lib/apt/lists/*

# torch first, in a layer of its own: an edit of the source does not install it anew
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.11" torchvision

COPY . /src
RUN pip install --no-cache-dir /src && rm -rf /src

RUN useradd --create-home --uid 1000 lgp && mkdir /project && chown lgp:lgp /project
USER lgp
WORKDIR /project
# a mounted project may belong to another user
RUN git config --global --add safe.directory '*' \
    && git config --global user.name lgp && git config --global user.email lgp@localhost

CMD ["lgp", "--help"]
