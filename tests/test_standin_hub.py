"""The stand-in Hub: the real clients work with it, and it notes what they ask."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import standin_hub
import standin_material
from conftest import TinyCheckpoint, cli_environment
from standin_faults import Redirect, Status
from standin_hub import Hub
from standin_material import FILES, GREETING_SHA1, MODEL, WEIGHTS, ask

Client = Callable[..., Any]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A stand-in with the repository org/name."""
    with standin_hub.serve(standin_material.fill(tmp_path / "root")) as hub:
        yield hub


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    """Run Python code with the real libraries in a child process; what it binds to `result` comes back."""

    def run(code: str, **environment: str) -> Any:
        settings = cli_environment() | {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
        settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"} | environment
        settings.pop("HF_TOKEN", None)
        script = f"import json, huggingface_hub as hf\n{code}\nprint(json.dumps(result))"
        done = subprocess.run([sys.executable, "-c", script], env=settings, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# the real clients


def test_snapshots_cold_and_warm(hub: Hub, client: Client, tmp_path: Path) -> None:
    folder = client("result = hf.snapshot_download('org/name')")
    assert tree(Path(folder)) == FILES
    asked = [request.path for request in hub.requests("GET", contains="/resolve/")]
    assert len(asked) == len(set(asked)) == len(FILES)
    hub.clear()
    assert client("result = hf.snapshot_download('org/name')") == folder
    assert [request.path for request in hub.requests(contains="name")] == ["/api/models/org/name/revision/main"]
    hub.clear()
    client(f"result = hf.snapshot_download('org/name', revision={Path(folder).name!r})")
    assert hub.requests(contains="name") == [], "a commit that is here whole needs no request"
    client(f"result = hf.snapshot_download('org/name', local_dir={str(tmp_path / 'local')!r})")
    assert tree(tmp_path / "local") == FILES


def test_the_library_reads_facts(hub: Hub, client: Client) -> None:
    hub.describe("org/name", downloads=7)
    client_code = """
api = hf.HfApi()
info = api.model_info('org/name', files_metadata=True)
path = hf.hf_hub_download('org/name', 'greeting.txt')
missing = []
for repo, revision in (('org/none', None), ('org/name', None), ('org/name', 'v9')):
    try:
        hf.hf_hub_download(repo, 'x', revision=revision)
    except Exception as error:
        missing.append(type(error).__name__)
result = {
    'siblings': {s.rfilename: [s.size, s.blob_id, s.lfs and s.lfs.sha256] for s in info.siblings},
    'card': [info.card_data.license, info.card_data.base_model, info.downloads, 'license:apache-2.0' in info.tags],
    'path': path, 'missing': missing, 'files': api.list_repo_files('org/name'),
    'top': [entry.path for entry in api.list_repo_tree('org/name')],
    'handle': hf.HfFileSystem().open('org/name/model.bin').read().hex()[:16],
}
"""
    facts = client(client_code)
    assert {name: size for name, (size, _, _) in facts["siblings"].items()} == {n: len(c) for n, c in FILES.items()}
    assert facts["siblings"]["greeting.txt"] == [6, GREETING_SHA1, None]
    assert facts["siblings"]["model.bin"][2] == hashlib.sha256(WEIGHTS).hexdigest()
    assert facts["card"] == ["apache-2.0", "org/parent", 7, True]
    assert Path(facts["path"]).read_bytes() == b"hello\n"
    assert facts["missing"] == ["RepositoryNotFoundError", "RemoteEntryNotFoundError", "RevisionNotFoundError"]
    assert sorted(facts["files"]) == sorted(FILES)
    assert sorted(facts["top"]) == ["README.md", "deep", "greeting.txt", "model.bin"]
    assert facts["handle"] == WEIGHTS[:8].hex()


def test_ten_thousand_files_come_in_pages(hub: Hub, client: Client) -> None:
    hub.add_synthetic("org/many", {f"part-{i:05}.txt": b"x" * (i % 7) for i in range(10_000)})
    began = time.monotonic()
    sizes = client("result = [entry.size for entry in hf.list_repo_tree('org/many', recursive=True)]")
    assert sizes == [i % 7 for i in range(10_000)]
    assert len(hub.requests("GET", contains="/tree/")) == 10
    assert time.monotonic() - began < 30
    hub.clear()
    page, body = ask(hub, "/api/models/org/many/tree/main?limit=3")
    assert len(json.loads(body)) == 3 and 'rel="next"' in page.headers["Link"]


def test_search(hub: Hub, client: Client, tiny_checkpoint: TinyCheckpoint, smollm2_gguf: Path) -> None:
    source = tiny_checkpoint("llama", shards=2)
    shutil.copytree(source, hub.repositories.root / "org" / "tiny-llama")
    (hub.repositories.root / "org" / "smol-gguf").mkdir()
    (hub.repositories.root / "org" / "smol-gguf" / "smol.gguf").symlink_to(smollm2_gguf)
    hub.describe("org/tiny-llama", downloads=3, likes=2)
    found = client("""
wanted = ['safetensors', 'gguf', 'downloads', 'cardData', 'siblings', 'gated']
show = lambda model: [model.id, model.downloads, model.safetensors and model.safetensors.total, model.gguf]
metadata = hf.get_safetensors_metadata('org/tiny-llama')
result = {
    'name': [model.id for model in hf.list_models(search='NAME')],
    'all': [show(model) for model in hf.list_models(expand=wanted)],
    'brief': [show(model) for model in hf.list_models(search='tiny', limit=1)],
    'gguf': [model.id for model in hf.list_models(filter='gguf')],
    'counted': sum(metadata.parameter_count.values()),
}
""")
    assert found["name"] == ["org/name"]
    assert found["gguf"] == ["org/smol-gguf"]
    assert found["brief"] == [["org/tiny-llama", 3, None, None]], "as on the Hub: more only when it is asked for"
    by_name = {name: (weights, gguf) for name, _, weights, gguf in found["all"]}
    assert by_name["org/tiny-llama"][0] == found["counted"] > 0, "the library counts the headers' weights itself"
    assert by_name["org/smol-gguf"][1]["total"] == 134_515_008, "SmolLM2-135M's published number of weights"
    assert by_name["org/smol-gguf"][1]["architecture"] == "llama"


@pytest.mark.slow
def test_transformers(hub: Hub, client: Client, tiny_checkpoint: TinyCheckpoint) -> None:
    shutil.copytree(tiny_checkpoint("llama"), hub.repositories.root / "org" / "tiny")
    ids = client("""
import transformers
tokenizer = transformers.AutoTokenizer.from_pretrained('org/tiny')
result = [transformers.AutoConfig.from_pretrained('org/tiny').model_type, tokenizer('hello world')['input_ids']]
""")
    assert ids[0] == "llama" and len(ids[1]) > 1
    assert hub.requests("GET", suffix="config.json") and hub.requests(suffix="additional_chat_templates")


def test_uploads(hub: Hub, client: Client, tmp_path: Path) -> None:
    big = tmp_path / "big.gguf"
    big.write_bytes(os.urandom(3_000_000))
    sums = client(f"""
api = hf.HfApi(token='hf_writer')
url = api.create_repo('org/fresh')
result = [url.repo_id, api.create_repo('org/fresh', exist_ok=True).repo_id, api.whoami()['name']]
try:
    api.create_repo('org/fresh')
except hf.errors.HfHubHTTPError as error:
    result.append(error.response.status_code)
api.upload_file(path_or_fileobj=b'hello\\n', path_in_repo='docs/greeting.txt', repo_id='org/fresh')
for name in ('a.gguf', 'a.gguf', 'b.gguf'):
    api.upload_file(path_or_fileobj={str(big)!r}, path_in_repo=name, repo_id='org/fresh')
api.upload_file(path_or_fileobj=b'old', path_in_repo='old.txt', repo_id='org/fresh')
api.delete_file('old.txt', repo_id='org/fresh')
result.append(hf.snapshot_download('org/fresh'))
""")
    assert sums[:4] == ["org/fresh", "org/fresh", "tester", 409]
    whole = {"docs/greeting.txt": b"hello\n", "a.gguf": big.read_bytes(), "b.gguf": big.read_bytes()}
    assert tree(hub.repositories.root / "org" / "fresh") == whole
    assert tree(Path(sums[4])) == whole
    (put,) = hub.requests("PUT")
    assert put.received == 3_000_000 and put.path.endswith(hashlib.sha256(big.read_bytes()).hexdigest())
    assert put.authorization is None


def test_uploads_are_checked(hub: Hub) -> None:
    commit = "/api/models/org/name/commit/main"
    line = json.dumps({"key": "file", "value": {"path": "../x", "content": "aGk=", "encoding": "base64"}}).encode()
    assert ask(hub, commit, "POST", line)[0].status == 401, "nobody writes without a token"
    assert ask(hub, commit, "POST", line, Authorization="Bearer t")[0].status == 400
    assert not (hub.repositories.root / "org" / "x").exists()
    absent = {"key": "lfsFile", "value": {"path": "m.gguf", "algo": "sha256", "oid": "0" * 64, "size": 1}}
    assert ask(hub, commit, "POST", json.dumps(absent).encode(), Authorization="Bearer t")[0].status == 400
    assert ask(hub, "/lfs/org/name/" + "0" * 64, "PUT", b"not that")[0].status == 400
    hub.fail_route("lfs/*", Status(503))
    digest = hashlib.sha256(b"that").hexdigest()
    assert [ask(hub, f"/lfs/org/name/{digest}", "PUT", b"that")[0].status for _ in range(2)] == [503, 200]


# access


def test_private_and_gated(hub: Hub, client: Client) -> None:
    hub.add_synthetic("org/gated", {"config.json": b"{}"})
    hub.require_token("org/name", "hf_mine")
    hub.require_token("org/gated", "hf_mine", gated="manual")
    seen = client("""
def outcome(repo, token):
    try:
        name = 'config.json' if 'gated' in repo else 'greeting.txt'
        return open(hf.hf_hub_download(repo, name, token=token)).read()
    except Exception as error:
        return [type(error).__name__, error.response.status_code]
result = [outcome(repo, token) for repo in ('org/name', 'org/gated') for token in (False, 'hf_other', 'hf_mine')]
result += [hf.model_info('org/gated').gated, [model.id for model in hf.list_models()]]
""")
    assert seen[:3] == [["RepositoryNotFoundError", 401], ["RepositoryNotFoundError", 404], "hello\n"]
    assert seen[3:6] == [["GatedRepoError", 401], ["GatedRepoError", 403], "{}"]
    assert seen[6:] == ["manual", ["org/gated"]]
    assert hub.requests("GET", suffix="greeting.txt")[-1].authorization == "Bearer hf_mine"


def test_a_redirect_keeps_the_path_and_tells_the_hash(hub: Hub, client: Client) -> None:
    with standin_hub.serve(hub.repositories.root) as other:
        hub.fail("org/name", "model.bin", Redirect(other.address), times=None)
        path = client("result = hf.hf_hub_download('org/name', 'model.bin', token='hf_secret')")
        assert Path(path).read_bytes() == WEIGHTS
        assert other.requests("GET", suffix="model.bin")
        assert {request.authorization for request in other.log} == {None}
        assert {request.authorization for request in hub.requests(suffix="model.bin")} == {"Bearer hf_secret"}
        answer, body = ask(hub, MODEL, Range="bytes=5-")
        assert (answer.status, body, answer.headers["Location"]) == (302, b"", other.address + MODEL)
        assert answer.headers["X-Linked-ETag"] == f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
        assert answer.headers["X-Linked-Size"] == str(len(WEIGHTS))


def test_as_a_program(hub: Hub, tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    command = [sys.executable, standin_hub.__file__, str(hub.repositories.root), "--log", str(log), "--rate", "1e6"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            port = int(address.rsplit(":", 1)[1])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            began = time.monotonic()
            connection.request("GET", MODEL, headers={"Range": "bytes=12000-"})
            assert connection.getresponse().read() == WEIGHTS[12_000:]
            assert time.monotonic() - began >= 0.45, "--rate holds"
            connection.close()
        finally:
            process.terminate()
    line = json.loads(log.read_text())
    assert (line["method"], line["path"], line["range"], line["sent"]) == ("GET", MODEL, "bytes=12000-", 500_000)
