# docker build -t gpt .  &&  docker run --rm --gpus all --ipc=host gpt                            the demo
# docker run --rm --gpus all --ipc=host -v ./out:/gpt/out gpt python nanoGPT/train.py ...          or any other command
# g++: Triton compiles a launcher
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /gpt
COPY pyproject.toml constraints.txt README.md ./
RUN pip install --no-cache-dir -c constraints.txt -e .
COPY . .
ENV PYTHONUNBUFFERED=1
CMD ["python", "demo.py"]
