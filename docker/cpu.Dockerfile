# drlora on processors:
# docker build -f docker/cpu.Dockerfile --build-arg TORCH_CPU_INDEX=URL -t drlora:cpu .
# The argument is an index with torch's build without CUDA; without it the image is gigabytes larger.
# Then: docker run --rm -v "$PWD:/data" drlora:cpu train embedded output_dir=/data/run
FROM python:3.11-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/data/huggingface

WORKDIR /opt/drlora
# What changes least comes first: the packages are a layer of their own.
COPY requirements/torch.txt requirements/lock.txt requirements/
ARG TORCH_CPU_INDEX=
RUN PIP_EXTRA_INDEX_URL="$TORCH_CPU_INDEX" pip install -r requirements/torch.txt \
    && pip install -r requirements/lock.txt
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY src src
RUN pip install --no-deps --no-build-isolation .

RUN useradd --create-home --uid 1000 user && mkdir /data && chown user /data
USER 1000
WORKDIR /data
ENTRYPOINT ["drlora"]
CMD ["--help"]
