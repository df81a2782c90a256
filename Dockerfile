# syntax=docker/dockerfile:1
FROM python:3.11-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/tollgate
ENV PATH=/opt/tollgate/bin:$PATH
WORKDIR /src
# Dependencies change less often than the code: a layer of their own.
COPY .locks/run.txt .locks/run.txt
RUN pip install --require-hashes --requirement .locks/run.txt
COPY pyproject.toml README.md LICENSE ./
COPY proxy proxy
COPY migrations migrations
RUN pip install --no-deps --no-build-isolation .

FROM python:3.11-slim
RUN groupadd --system --gid 10001 tollgate \
    && useradd --system --uid 10001 --gid tollgate --no-create-home --shell /usr/sbin/nologin tollgate \
    && install -d -o tollgate -g tollgate -m 0700 /data
COPY --from=build /opt/tollgate /opt/tollgate
COPY config.toml /etc/tollgate/config.toml
ENV PATH=/opt/tollgate/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TOLLGATE_CONFIG=/etc/tollgate/config.toml \
    TOLLGATE_DATA_DIR=/data
USER tollgate
VOLUME /data
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=15s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health/live', timeout=2)"]
ENTRYPOINT ["tollgate"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8080"]
