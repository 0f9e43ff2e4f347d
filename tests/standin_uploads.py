"""How the stand-in Hub takes files in: repositories created, objects sent, commits written into its folders."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from standin_files import LFS_SUFFIXES, Refusal, Repositories, Snapshot

Json = dict[str, Any]


class Uploads:
    """What was sent and is not in a commit yet lies in <root>/.objects, by sha256."""

    def __init__(self, repositories: Repositories) -> None:
        self._repositories = repositories
        self._objects = repositories.root / ".objects"
        self._writing = threading.Lock()

    def create(self, asked: Json, user: str) -> tuple[str, bool, bool]:
        """Make an empty repository: its name, whether it shall be private, and whether it is new."""
        repo = f"{asked.get('organization') or user}/{asked['name']}"
        if asked.get("type", "model") != "model":
            raise Refusal(400, None, "only models are kept here")
        is_new = repo not in self._repositories.names()
        self._repositories.folder(repo).mkdir(parents=True, exist_ok=True)
        return repo, asked.get("visibility") == "private" or asked.get("private") is True, is_new

    def modes(self, snapshot: Snapshot, asked: Json) -> Json:
        """How each file is to be sent, and what lies under its name now."""
        files = []
        for file in asked["files"]:
            entry = snapshot.entries.get(file["path"])
            mode = "lfs" if PurePosixPath(file["path"]).suffix in LFS_SUFFIXES else "regular"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            files.append(answer | ({"oid": entry.etag} if entry else {}))
        return {"files": files, "commitOid": snapshot.commit}

    def batch(self, snapshot: Snapshot, asked: Json, address: str) -> Json:
        """Where to send each object; an object that is here needs no action."""
        objects: list[Json] = []
        for wanted in asked["objects"]:
            answer: Json = {"oid": wanted["oid"], "size": wanted["size"]}
            if self._find(snapshot, wanted["oid"]) is None:
                answer["actions"] = {"upload": {"href": f"{address}/lfs/{snapshot.repo}/{wanted['oid']}"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def take(self, oid: str, chunks: Iterator[bytes]) -> None:
        """Keep an object as it comes in; its name must be its hash."""
        self._objects.mkdir(parents=True, exist_ok=True)
        path = self._objects / f"{uuid4().hex}.incoming"
        digest = hashlib.sha256()
        try:
            with path.open("wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() != oid:
                raise Refusal(400, None, f"the object's sha256 is {digest.hexdigest()}, not {oid}")
            path.replace(self._objects / oid)
        finally:
            path.unlink(missing_ok=True)

    def commit(self, snapshot: Snapshot, lines: bytes) -> None:
        """Carry out a commit, after every line of it was looked at."""
        folder = self._repositories.folder(snapshot.repo)
        if not folder.is_dir():
            raise Refusal(403, None, f"{snapshot.repo} lies in memory: nothing can be written to it")
        with self._writing:
            steps = []
            for line in lines.splitlines():
                item = json.loads(line)
                key, value = item["key"], item["value"]
                if key == "header":
                    if value.get("parentCommit", snapshot.commit) != snapshot.commit:
                        raise Refusal(412, None, "A commit has happened since. Please refresh and try again.")
                    continue
                if key not in ("file", "lfsFile", "deletedFile", "deletedFolder"):
                    raise Refusal(400, None, f"no such operation: {key}")
                steps.append((key, _below(folder, value["path"]), self._content(snapshot, key, value)))
            for key, path, content in steps:
                _carry_out(key, path, content)
            for _, _, content in steps:
                if isinstance(content, Path) and content.parent == self._objects:
                    content.unlink(missing_ok=True)

    def _content(self, snapshot: Snapshot, key: str, value: Json) -> bytes | Path | None:
        if key == "file":
            try:
                return base64.b64decode(value["content"], validate=True)
            except binascii.Error as error:
                raise Refusal(400, None, f"{value['path']}: {error}") from None
        if key == "lfsFile":
            if (found := self._find(snapshot, value["oid"])) is None:
                raise Refusal(400, None, f"LFS pointer pointed to a file that does not exist: {value['path']}")
            return found
        if not any(f"{name}/".startswith(value["path"].rstrip("/") + "/") for name in snapshot.entries):
            raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
        return None

    def _find(self, snapshot: Snapshot, oid: str) -> Path | None:
        """An object sent before, or one that the repository holds."""
        if len(oid) == 64 and oid.isalnum() and (self._objects / oid).is_file():
            return self._objects / oid
        for entry in snapshot.entries.values():
            if entry.lfs and entry.etag == oid and isinstance(entry.source, Path):
                return entry.source
        return None


def _below(folder: Path, name: str) -> Path:
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or {"..", ".git"} & set(path.parts) or "\\" in name:
        raise Refusal(400, None, f"Invalid file name: {name}")
    return folder.joinpath(*path.parts)


def _carry_out(key: str, path: Path, content: bytes | Path | None) -> None:
    if key == "deletedFolder":
        shutil.rmtree(path)
        return
    if key == "deletedFile":
        path.unlink()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{uuid4().hex}.incoming")
    if isinstance(content, Path):
        shutil.copyfile(content, fresh)
    else:
        fresh.write_bytes(content or b"")
    fresh.replace(path)
