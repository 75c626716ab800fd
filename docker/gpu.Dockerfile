# drlora on NVIDIA GPUs: docker build -f docker/gpu.Dockerfile -t drlora:gpu .
# Then: docker run --rm --gpus all -v "$PWD:/data" drlora:gpu train embedded output_dir=/data/run
# Nobody has run this image on a GPU yet.
FROM pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/data/huggingface

WORKDIR /opt/drlora
COPY requirements/lock.txt requirements/
# torch and triton are the image's own.
RUN sed -i -e '/^-c/d' -e '/^triton/d' requirements/lock.txt \
    && pip install -r requirements/lock.txt
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY src src
RUN pip install --no-deps --no-build-isolation . && pip install "bitsandbytes>=0.50"

RUN useradd --create-home --uid 1000 user && mkdir /data && chown user /data
USER 1000
WORKDIR /data
ENTRYPOINT ["drlora"]
CMD ["--help"]
