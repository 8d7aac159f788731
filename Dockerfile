# One image for the phfs command and for the CSI plugin (phfs-csi: node, controller, hold; csi/deploy has the manifests).
#   docker build -t phfs:0.1.0 .
# To mount, a container needs the device and the right:
#   docker run --device /dev/fuse --cap-add SYS_ADMIN --security-opt apparmor=unconfined \
#     -v phfs-state:/var/lib/phfs -v /mnt/group:/mnt/group:rshared -e AWS_ACCESS_KEY_ID -e AWS_SECRET_ACCESS_KEY \
#     phfs mount --foreground --group research /mnt/group
# /var/lib/phfs holds bytes that are not uploaded yet: give it a volume.

FROM python:3.12-slim-bookworm AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libfuse3-dev pkg-config \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/phfs
WORKDIR /src
# What is not in the lock file, or has another hash there, ends the build.
COPY csi/requirements.lock ./
RUN /opt/phfs/bin/pip install --no-cache-dir --require-hashes -r requirements.lock
COPY pyproject.toml README.md ./
COPY phfs_fuse phfs_fuse
COPY csi/phfs_csi csi/phfs_csi
RUN /opt/phfs/bin/pip install --no-cache-dir --no-deps . \
    && /opt/phfs/bin/pip check \
    && /opt/phfs/bin/pip uninstall --yes pip
# What the image has of Python, as CycloneDX: docker run --entrypoint cat phfs /opt/phfs/sbom.json
RUN python -m venv /opt/sbom \
    && /opt/sbom/bin/pip install --no-cache-dir cyclonedx-bom==7.* \
    && /opt/sbom/bin/cyclonedx-py environment --output-reproducible -o /opt/phfs/sbom.json /opt/phfs/bin/python

FROM python:3.12-slim-bookworm
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates fuse3 libfuse3-3 tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 phfs
COPY --from=build /opt/phfs /opt/phfs
RUN ln -s /opt/phfs/bin/phfs /opt/phfs/bin/phfs-csi /usr/local/bin/ \
    && ln -s /opt/phfs/bin/mount.phfs /sbin/mount.phfs \
    && phfs --version \
    && phfs-csi --version
# Root by default, as mounting for other containers needs it. The tools, and mounts of one's own through fusermount3,
# work with --user phfs; its state is then in /home/phfs/.local/state/phfs.
VOLUME ["/var/lib/phfs", "/var/cache/phfs"]
# tini reaps what is left behind and passes signals on. When it ends, all processes of the container end.
ENTRYPOINT ["tini", "--", "phfs"]
CMD ["--help"]
