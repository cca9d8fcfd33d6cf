"""Small files in the true formats of MNIST and CIFAR-10, and a local server for them."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import socket
import struct
import tarfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Files = dict[str, bytes]

TRAIN, TEST = 40, 20


def idx_bytes(array: NDArray[Any]) -> bytes:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def random_images(n: int, *shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(n).integers(0, 256, size=(n, *shape), dtype=np.uint8)


def mnist_archives() -> Files:
    files = {}
    for part, n in (("train", TRAIN), ("t10k", TEST)):
        files[f"{part}-images-idx3-ubyte.gz"] = gzip.compress(idx_bytes(random_images(n, 28, 28)))
        files[f"{part}-labels-idx1-ubyte.gz"] = gzip.compress(idx_bytes(np.arange(n) % 10))
    return files


def cifar_batches() -> Files:
    def batch(n: int, start: int) -> bytes:
        labels = [(start + i) % 10 for i in range(n)]
        return pickle.dumps({"data": random_images(n + start, 3072)[:n], "labels": labels})

    members = {f"data_batch_{k}": batch(TRAIN // 5, k) for k in range(1, 6)}
    members["test_batch"] = batch(TEST, 0)
    members["batches.meta"] = pickle.dumps({"label_names": [f"thing{i}" for i in range(10)]})
    return members


def cifar_archive(members: Files) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    # A fixed time stamp, so that the same members have the same MD5.
    return gzip.compress(file.getvalue(), mtime=0)


def md5_of(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


class Mirror:
    """A local server of the published files that counts what is fetched."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.fetched: Counter[str] = Counter()
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                name = self.path.rsplit("/", 1)[-1]
                # torchvision follows redirects by a GET that says so and reads no body.
                if self.headers.get("Method") != "HEAD":
                    mirror.fetched[name] += 1
                time.sleep(0.02)
                self._answer(body=True)

            def _answer(self, body: bool) -> None:
                data = mirror.files.get(self.path.rsplit("/", 1)[-1])
                self.send_response(404 if data is None else 200)
                self.send_header("Content-Length", str(len(data or b"")))
                self.end_headers()
                if body and data:
                    self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def place_files(folder: Path, files: Files, unpack: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        target = folder / (name.removesuffix(".gz") if unpack else name)
        target.write_bytes(gzip.decompress(data) if unpack else data)
