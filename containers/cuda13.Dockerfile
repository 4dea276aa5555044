# The peak finder on NVIDIA GPUs with a driver for CUDA 13. In the repository's root:
#
#   docker build -f containers/cuda13.Dockerfile -t peaknet-predict:cuda13 .
#
# torch and CuPy bring CUDA's libraries along. Triton builds its launchers with gcc.
FROM python:3.12-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python -m pip install --no-cache-dir -c constraints.txt \
        "$(grep '^torch==' constraints.txt)" '.[cuda13,images]' \
    && useradd --create-home peaknet
USER peaknet
WORKDIR /home/peaknet
ENTRYPOINT ["peaknet-predict"]
CMD ["--help"]
