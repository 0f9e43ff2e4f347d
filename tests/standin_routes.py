"""What the stand-in Hub's addresses mean: models, trees, files, search, uploads, and who may see what."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import unquote

import standin_cards
from standin_faults import Fault, Redirect, Stall, Status, WrongETag
from standin_files import Refusal, Snapshot
from standin_http import Wire

# whom every token belongs to
_USER = "tester"
_REPO = r"(?P<repo>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
# method, path as it was sent (still quoted), the Handler's method that answers it
_ROUTES = [
    ("GET", r"/api/models", "_search"),
    ("GET", rf"/api/models/{_REPO}", "_info"),
    ("GET", rf"/api/models/{_REPO}/revision/{_REVISION}", "_info"),
    ("GET", rf"/api/models/{_REPO}/refs", "_refs"),
    ("GET", rf"/api/models/{_REPO}/tree/{_REVISION}(?:/(?P<path>.+))?", "_tree"),
    ("GET", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", "_resolve"),
    ("GET", r"/api/whoami-v2", "_whoami"),
    ("POST", r"/api/validate-yaml", "_validate"),
    ("POST", r"/api/repos/create", "_create"),
    ("POST", rf"/api/models/{_REPO}/preupload/{_REVISION}", "_preupload"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "_batch"),
    ("PUT", rf"/lfs/{_REPO}/(?P<oid>[0-9a-f]{{64}})", "_take"),
    ("POST", rf"/api/models/{_REPO}/commit/{_REVISION}", "_commit"),
]


class Handler(Wire):
    """One connection of a client."""

    def answer(self, path: str) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, name in _ROUTES:
            if wanted == method and (match := re.fullmatch(pattern, path)):
                if name != "_resolve":
                    self._meet_route_fault()
                found = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                return getattr(self, name)(**found)  # type: ignore[no-any-return]
        self._meet_route_fault()
        raise Refusal(404, None, f"no such route: {self.command} {path}")

    def _meet_route_fault(self) -> None:
        fault = self.hub.faults.meet(None, self.record.path.strip("/"), self.command)
        if isinstance(fault, Stall):
            self.pause(fault.seconds)
        self._refuse(fault)

    def _refuse(self, fault: Fault | None) -> None:
        if isinstance(fault, Status):
            headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            raise Refusal(fault.code, fault.error_code, f"the stand-in was told to answer {fault.code}", headers)
        if isinstance(fault, Redirect):
            raise Refusal(302, None, "Found", {"Location": fault.location(self.path)})

    # routes

    def _open(self, repo: str, revision: str = "main", *, content: bool = False) -> Snapshot:
        """A revision, if this client may see it; with `content`: if it may fetch its files."""
        guard = self.hub.guards.get(repo)
        sent = self.record.authorization
        if guard is not None and sent != f"Bearer {guard.token}":
            if not guard.gated and sent is None:
                raise Refusal(401, "RepoNotFound", "Invalid username or password.")
            if not guard.gated:
                raise Refusal(404, "RepoNotFound", "Repository not found")
            if content:
                raise Refusal(403 if sent else 401, "GatedRepo", f"Access to model {repo} is restricted.")
        return self.hub.snapshot(repo, revision)

    def _wishes(self) -> standin_cards.Wishes:
        def said(name: str) -> bool:
            return self.query.get(name, ["false"])[0].lower() in {"true", "1", ""}

        expand = (*self.query.get("expand", ()), *self.query.get("expand[]", ()))
        return standin_cards.Wishes(expand, said("full"), said("cardData"), said("config"), said("blobs"))

    def _info(self, repo: str, revision: str = "main") -> None:
        snapshot = self._open(repo, revision)
        self.send_json(standin_cards.about(snapshot, self.hub.facts.get(repo, {}), self._wishes()))

    def _refs(self, repo: str) -> None:
        self._open(repo)
        names = ["main", *self.hub.repositories.revisions(repo)]
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": self.hub.snapshot(repo, name).commit}
            for name in names
        ]
        self.send_json({"branches": branches, "converts": [], "tags": []})

    def _tree(self, repo: str, revision: str, path: str = "") -> None:
        snapshot = self._open(repo, revision)
        rows = snapshot.tree(path.strip("/"), self.query.get("recursive", ["false"])[0].lower() in {"true", "1"})
        if path and not rows:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist on {revision}")
        self.send_page(rows)

    def _search(self) -> None:
        words = self.query.get("search", [""])[0].lower().split()
        authors = {author.lower() for author in self.query.get("author", ())}
        tags = {tag for value in self.query.get("filter", ()) for tag in value.split(",")}
        tags |= set(self.query.get("pipeline_tag", ()))
        rows = []
        for repo in self.hub.repositories.names():
            guard = self.hub.guards.get(repo)
            hidden = guard and not guard.gated and self.record.authorization != f"Bearer {guard.token}"
            if hidden or (authors and repo.split("/")[0].lower() not in authors):
                continue
            if all(word in repo.lower() for word in words):
                snapshot, facts = self.hub.snapshot(repo), self.hub.facts.get(repo, {})
                info = standin_cards.about(snapshot, facts, standin_cards.Wishes())
                if tags <= set(info["tags"]):
                    rows.append((info, standin_cards.in_search(snapshot, facts, self._wishes())))
        key = self.query.get("sort", ["downloads"])[0]
        if rows and isinstance(rows[0][0].get(key), (int, str)):
            rows.sort(key=lambda row: row[0][key], reverse=True)
        self.send_page([row for _, row in rows])

    def _whoami(self) -> None:
        if self.record.authorization is None:
            raise Refusal(401, None, "Invalid username or password.")
        self.send_json(
            {"type": "user", "name": _USER, "fullname": "Tester", "orgs": [], "auth": {"type": "access_token"}}
        )

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        has_range = "Range" in self.headers
        fault = self.hub.faults.meet(repo, path, self.command, has_range)
        if isinstance(fault, Status):
            self._refuse(fault)
        snapshot = self._open(repo, revision, content=True)
        entry = snapshot.entries.get(path)
        if entry is None:
            raise Refusal(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": snapshot.commit})
        etag = f'"{fault.etag if isinstance(fault, WrongETag) else entry.etag}"'
        headers = {"X-Repo-Commit": snapshot.commit, "Accept-Ranges": "bytes"}
        if entry.in_xet:
            headers |= {
                "X-Xet-Hash": entry.xet_hash,
                "X-Xet-Refresh-Route": f"/api/models/{repo}/xet-read-token/{snapshot.commit}",
            }
        if isinstance(fault, Redirect):
            headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(entry.size), "Location": fault.location(self.path)}
            return self.send(b"", 302, headers)
        headers |= {"ETag": etag, "Content-Type": "application/octet-stream"}
        self.send_file(entry, headers, fault)

    # uploads

    def _writable(self, repo: str, revision: str = "main") -> Snapshot:
        """A revision that this client may write to: anyone with a token may, where no other is required."""
        if self.record.authorization is None:
            raise Refusal(401, None, "Invalid username or password.")
        if revision != "main":
            raise Refusal(400, None, "only main can be written to here")
        return self._open(repo, content=True)

    def _asked(self) -> Any:
        return json.loads(b"".join(self.incoming))

    def _validate(self) -> None:
        self._asked()
        self.send_json({"errors": [], "warnings": []})

    def _create(self) -> None:
        if self.record.authorization is None:
            raise Refusal(401, None, "Invalid username or password.")
        repo, private, is_new = self.hub.uploads.create(self._asked(), _USER)
        answer = {"url": f"{self.hub.address}/{repo}", "name": repo, "id": repo}
        if not is_new:
            return self.send_json(answer | {"error": "You already created this model repo"}, 409)
        if private:
            self.hub.require_token(repo, self.record.authorization.removeprefix("Bearer "))
        self.send_json(answer)

    def _preupload(self, repo: str, revision: str) -> None:
        self.send_json(self.hub.uploads.modes(self._writable(repo, revision), self._asked()))

    def _batch(self, repo: str) -> None:
        self.send_json(self.hub.uploads.batch(self._writable(repo), self._asked(), self.hub.address))

    def _take(self, repo: str, oid: str) -> None:
        # the address itself is the right to write here, as on the Hub's storage
        self.hub.uploads.take(oid, self.incoming)
        self.send(b"", 200, {})

    def _commit(self, repo: str, revision: str) -> None:
        self.hub.uploads.commit(self._writable(repo, revision), b"".join(self.incoming))
        commit = self.hub.snapshot(repo).commit
        url = f"{self.hub.address}/{repo}/commit/{commit}"
        self.send_json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
