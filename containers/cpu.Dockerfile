# The peak finder without a GPU. In the repository's root:
#
#   docker build -f containers/cpu.Dockerfile -t peaknet-predict:cpu .
#
# torch's usual build for Linux brings CUDA along. --build-arg TORCH_INDEX=URL takes another one from
# the package index that torch's installation page names for machines without a GPU.
FROM python:3.12-slim
ARG TORCH_INDEX=""
WORKDIR /src
COPY . .
RUN python -m pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
        "$(grep '^torch==' constraints.txt)" \
    && python -m pip install --no-cache-dir -c constraints.txt '.[images]' \
    && useradd --create-home peaknet
USER peaknet
WORKDIR /home/peaknet
ENTRYPOINT ["peaknet-predict"]
CMD ["--help"]
