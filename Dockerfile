# The chatbot as a service, on a CPU:
#   docker build -t empathic .
#   docker run -p 127.0.0.1:8000:8000 -v ./runs/quickstart/model:/model:ro -e EMPATHIC_API_KEY=... empathic
# On a GPU (the wheels of PyPI bring CUDA):
#   docker build -t empathic:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
#   docker run --gpus all ... empathic:cuda
FROM python:3.11-slim

ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "$TORCH"

COPY . /opt/empathic
RUN pip install --no-cache-dir "/opt/empathic[serve]"

RUN useradd --create-home --uid 1000 empathic
USER empathic
ENV HF_HOME=/home/empathic/.cache/huggingface PYTHONUNBUFFERED=1
EXPOSE 8000
HEALTHCHECK --start-period=300s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["empathic", "serve", "--host", "0.0.0.0"]
CMD ["/model"]
