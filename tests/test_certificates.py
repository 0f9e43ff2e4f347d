"""Which certificates are trusted when files come by https."""

from __future__ import annotations

import hashlib
import http.server
import importlib
import shutil
import ssl
import subprocess
import threading
from pathlib import Path

import pytest

from llmkit.errors import LlmkitError
from llmkit.hub import client, wire
from llmkit.hub.repository import RemoteFile


def test_certificates_are_trusted_as_huggingface_hub_trusts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks the operating system, which OpenSSL, and so urllib, cannot everywhere."""
    httpx = importlib.import_module("huggingface_hub.utils").httpx
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=here"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(certificate, key)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *words: object) -> None:
            pass

    monkeypatch.setattr(wire, "TRIES", 1)
    data = b'{"model_type": "llama"}'
    file = RemoteFile("config.json", len(data), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = served.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        remote = wire.Remote("org/tiny: config.json", f"https://127.0.0.1:{server.server_port}/x", file)
        client.ssl_context.cache_clear()
        try:
            with pytest.raises(LlmkitError, match="certificate is not valid"):
                wire.read_range(remote, 0, file.nbytes)
            trusting = ssl.create_default_context(cafile=certificate)
            monkeypatch.setattr(httpx, "create_ssl_context", lambda: trusting)
            client.ssl_context.cache_clear()
            assert wire.read_range(remote, 0, file.nbytes) == data
        finally:
            client.ssl_context.cache_clear()
            server.shutdown()
