FROM python:3.12-slim

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PORT=8000

WORKDIR /app

# Requirements before code, the heaviest and slowest to change first: a new release reuses these layers.
# Wheels only: the image has no compiler, and needs none.
COPY ml-requirements.txt ./
RUN pip install --only-binary=:all: -r ml-requirements.txt
COPY requirements.txt ./
RUN pip install --only-binary=:all: -r requirements.txt

# Compiled here, because at run time the file system may be read-only.
COPY app ./app
RUN python -m compileall -q app

RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin diskless
USER 10001

STOPSIGNAL SIGTERM
# Live, not ready: a container that waits for its bucket to come back must not be restarted for it.
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s \
    CMD ["python", "-c", "import http.client, os, sys; server = http.client.HTTPConnection('127.0.0.1', int(os.environ['PORT']), timeout=4); server.request('GET', '/health/live'); sys.exit(server.getresponse().status != 200)"]
CMD ["python", "-m", "app", "serve"]
