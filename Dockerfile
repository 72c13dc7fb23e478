# An image to train in on GPUs: what `make setup` installs, and the kernels of the `gpu` extra built against that torch.
#
#     docker build --tag spanwise .
#     docker run --rm --gpus all --shm-size 16g spanwise make test    # its check; it needs no GPU to pass
#
# NOT BUILT YET where this was written, which has neither Docker nor a GPU: only its text has been checked, by hadolint
# and by tests/test_repository.py.
#
# Rocky Linux has the Python of constraints.txt; CUDA is that of torch's own build. The compilers stay in: Triton and
# DeepSpeed compile kernels when they run.
FROM nvidia/cuda:13.0.1-devel-rockylinux9

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# The distribution's release fixes their versions; a patch release would be gone from its mirrors with the next one.
# hadolint ignore=DL3041
RUN dnf install -y python3.11 python3.11-devel gcc-c++ make git \
    && dnf clean all \
    && useradd --uid 1000 --create-home spanwise \
    && install -d -o spanwise /home/spanwise/spanwise

USER 1000
WORKDIR /home/spanwise/spanwise
ENV PIP_NO_CACHE_DIR=1

# The dependencies first, so that a change of the code does not install them again.
COPY --chown=1000 Makefile pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=1000 train/__init__.py train/
COPY --chown=1000 launch/__init__.py launch/
RUN make setup PYTHON=python3.11

# There is no GPU while an image is built to tell for which ones: A100, H100 and H200, B200.
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0"
ARG MAX_JOBS=4
RUN .venv/bin/pip install --constraint constraints.txt --no-build-isolation --editable ".[gpu]"

COPY --chown=1000 . .
ENV PATH=/home/spanwise/spanwise/.venv/bin:$PATH
CMD ["make", "help"]
