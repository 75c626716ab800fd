# drlora on processors: docker build -f docker/cpu.Dockerfile -t drlora:cpu .
# Then: docker run --rm -v "$PWD:/data" drlora:cpu train embedded output_dir=/data/run
FROM python:3.11-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/data/huggingface

WORKDIR /opt/drlora
# What changes least comes first: the packages are a layer of their own.
COPY requirements/torch.txt requirements/lock.txt requirements/
RUN pip install -r requirements/torch.txt --extra-index-url https://download.pytorch.org/whl/cpu \
    && pip install -r requirements/lock.txt
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY src src
RUN pip install --no-deps --no-build-isolation .

RUN useradd --create-home --uid 1000 user && mkdir /data && chown user /data
USER 1000
WORKDIR /data
ENTRYPOINT ["drlora"]
CMD ["--help"]
