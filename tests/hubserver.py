"""Minimal self-hosted, Hub-compatible server for tests (stdlib and PyYAML only).

Enough of the Hugging Face Hub HTTP API for huggingface_hub 2.4 / transformers 5.23 to do, with
HF_ENDPOINT=http://127.0.0.1:PORT and HF_HUB_DISABLE_XET=1:
create_repo -> upload_folder / create_commit (regular + LFS) -> hf_hub_download / snapshot_download /
from_pretrained(trust_remote_code) -> re-push -> ModelCard, branches, tags, PRs, private repos, gated 404s.

Use:  with HubServer() as hub: os.environ["HF_ENDPOINT"] = hub.url   (before importing huggingface_hub)
CLI:  python hubserver.py PORT
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import io
import json
import re
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.gguf", "*.onnx", "*.zip", "*tfevents*")
PREFIX = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Entry:
    oid: str  # git blob sha1 (of the pointer file for LFS)
    size: int
    sha256: str | None = None  # set for LFS files
    data: bytes | None = None  # set for regular files


@dataclass
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    date: str
    tree: dict[str, Entry]


@dataclass
class Repo:
    rtype: str  # models | datasets | spaces
    rid: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    prs: dict[str, str] = field(default_factory=dict)  # "refs/pr/1" -> oid

    def add(self, parent: Commit | None, title, message, tree) -> Commit:
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        seed = json.dumps(
            [parent.oid if parent else None, title, date, time.time_ns(), sorted((p, e.oid) for p, e in tree.items())]
        )
        c = Commit(hashlib.sha1(seed.encode()).hexdigest(), parent.oid if parent else None, title, message, date, tree)
        self.commits[c.oid] = c
        return c

    def resolve(self, rev: str) -> Commit | None:
        for table in (self.branches, self.tags, self.prs):
            if rev in table:
                return self.commits[table[rev]]
        if re.fullmatch(r"[0-9a-f]{5,40}", rev):
            return next((c for o, c in self.commits.items() if o.startswith(rev)), None)
        return None


@dataclass
class Fault:
    """What the server does wrong in answer to a request.

    kind: "status" answers with `status`. "reset" resets the connection before the request is served, "lost" after it.
    "refuse" reads half of an upload and answers 403. "redirect" names the same path on another host. "cut" breaks off
    in the middle of the body. "short" and "long" send a body of another length, with a Content-Length to match. "flip"
    changes its last byte, and "trickle" sends it in a thousand parts. "meanwhile" calls `meanwhile`, then serves.
    """

    kind: str = "status"
    status: int = 500
    times: float = float("inf")  # how many requests it strikes
    retry_after: int | None = None
    meanwhile: Callable[[], object] = lambda: None
    struck: int = 0


class HubState:
    def __init__(self, tokens=("hf_test",), user="tester"):
        self.lock = threading.RLock()
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.tokens, self.user = set(tokens), user
        self.cdn_url = ""
        self.log: list[dict] = []  # every request: method, path, status, body keys
        self.fail: dict[str, int | Fault] = {}  # regex on "METHOD path" -> status or fault to inject
        self.renamed: dict[str, str] = {}  # repository -> its new name


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes; the second would wait 40 ms for an answer
    state: HubState

    # ---- plumbing -------------------------------------------------------------------------------
    def log_message(self, *a):
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            out = b""
            while n := int(self.rfile.readline().split(b";")[0], 16):
                out += self.rfile.read(n)
                self.rfile.readline()
            self.rfile.readline()
            return out
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, status=200, obj=None, data: bytes | None = None, headers=None, head=False):
        if obj is not None:
            data, ctype = json.dumps(obj).encode(), "application/json; charset=utf-8"
        else:
            data, ctype = data or b"", "application/octet-stream"
        headers, data = dict(headers or {}), self._spoil(data)
        if self._fault and self._fault.kind == "lost":
            self._rec["status"] = status
            return self._reset()
        self.send_response(status)
        self.send_header("Content-Type", headers.pop("Content-Type", ctype))
        self.send_header("Content-Length", headers.pop("Content-Length", str(len(data))))
        self.send_header("X-Request-Id", "Root=test")
        for k, v in headers.items():
            self.send_header(k, v)
        self.end_headers()
        self._rec["status"] = status
        if not head and self.command != "HEAD":
            self._write(data)

    def _spoil(self, data: bytes) -> bytes:
        """The body as the fault leaves it."""
        kind = self._fault.kind if self._fault and self.command == "GET" and data else ""
        changes = {
            "short": lambda: data[: len(data) // 2],
            "long": lambda: data + b"more",
            "flip": lambda: data[:-1] + bytes([data[-1] ^ 1]),
        }
        return changes[kind]() if kind in changes else data

    def _write(self, data: bytes):
        kind = self._fault.kind if self._fault else ""
        if kind == "cut":
            self.wfile.write(data[: len(data) // 2])
            self._reset()
        elif kind == "trickle":
            size = 1 + len(data) // 1000
            for at in range(0, len(data), size):
                self.wfile.write(data[at : at + size])
        else:
            self.wfile.write(data)

    def _reset(self):
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
        self.wfile = io.BytesIO()

    def _strike(self, path: str) -> Fault | None:
        """The fault for this request, if one is left."""
        for pattern, fault in list(self.state.fail.items()):
            if re.search(pattern, f"{self.command} {path}"):
                fault = fault if isinstance(fault, Fault) else Fault(status=fault)
                if fault.struck < fault.times:
                    fault.struck += 1
                    return fault
        return None

    def _misbehave(self, fault: Fault) -> bool:
        """Whether the fault has answered the request already."""
        if fault.kind == "reset":
            self._reset()
        elif fault.kind == "status":
            after = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            self.err(fault.status, None, "injected failure", headers=after)
        elif fault.kind == "redirect" and self._rec["origin"] == "hub":
            self.send(307, data=b"", headers={"Location": self.state.cdn_url + self.path})
        else:
            return False
        return True

    def err(self, status, code=None, message="error", **extra):
        h = {"X-Error-Message": message}
        if code:
            h["X-Error-Code"] = code
        h.update(extra.pop("headers", {}))
        self.send(status, {"error": message, **extra}, headers=h)

    def _token(self):
        a = self.headers.get("Authorization", "")
        return a[7:] if a.startswith("Bearer ") else None

    def _authed(self):
        return self._token() in self.state.tokens

    def _need_auth(self):
        if self._authed():
            return False
        self.err(401, None, "Invalid username or password.")
        return True

    def handle_any(self):
        u = urlsplit(self.path)
        self.q = {k: v[-1] for k, v in parse_qs(u.query).items()}
        path = u.path
        self._fault = self._strike(path)
        if self._fault and self._fault.kind == "refuse":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self._rec, self.close_connection = {}, True
            return self.err(403, None, "refused half-way", headers={"Connection": "close"})
        body = self._body()
        self._rec = {
            "method": self.command,
            "path": path,
            "query": u.query,
            "status": None,
            "auth": self._token() is not None,
            "origin": "cdn" if self.state.cdn_url.endswith(self.headers.get("Host", "-")) else "hub",
        }
        if body and len(body) < 200_000 and "json" in (self.headers.get("Content-Type") or ""):
            self._rec["body"] = body.decode("utf-8", "replace")[:600]
        self.state.log.append(self._rec)
        if self._fault:
            self._fault.meanwhile()
        with self.state.lock:
            if self._fault and self._misbehave(self._fault):
                return
            for old, new in self.state.renamed.items():
                if f"/{old}/" in f"{path}/":
                    return self.send(307, data=b"", headers={"Location": self.path.replace(old, new)})
            try:
                self.route(self.command, path, body)
            except Exception as e:  # pragma: no cover
                traceback.print_exc()
                self.err(500, None, f"{type(e).__name__}: {e}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    # ---- routing --------------------------------------------------------------------------------
    def route(self, m, path, body):
        def J():
            return json.loads(body or b"{}")

        base = f"http://{self.headers['Host']}"
        if m == "GET" and path == "/api/whoami-v2":
            return (
                self.err(401, None, "Invalid credentials in Authorization header")
                if not self._authed()
                else self.send(
                    obj={
                        "type": "user",
                        "id": "1",
                        "name": self.state.user,
                        "fullname": self.state.user,
                        "orgs": [],
                        "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": "write"}},
                    }
                )
            )
        if m == "POST" and path == "/api/repos/create":
            return self.create_repo(J(), base)
        if m == "DELETE" and path == "/api/repos/delete":
            return self.delete_repo(J())
        if m == "POST" and path == "/api/validate-yaml":
            return self.validate_yaml(J())
        if m == "GET" and path == "/api/agent-harnesses":
            return self.send(obj={"standardEnvVars": ["AI_AGENT", "AGENT"], "harnesses": {}})
        if mt := re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+?)\.git/info/lfs/objects/batch", path):
            return self.lfs_batch(mt[1] or "models", mt[2], J(), base)
        if mt := re.fullmatch(r"/_lfs/([0-9a-f]{64})", path):
            return self.lfs_blob(m, mt[1], body)
        if mt := re.fullmatch(r"/_lfs/([0-9a-f]{64})/verify", path):
            d = J()
            ok = d["oid"] in self.state.lfs and len(self.state.lfs[d["oid"]]) == d["size"]
            return self.send(obj={}) if ok else self.err(404, None, "LFS object missing")
        if mt := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/([a-z\-]+)(?:/(.*))?)?", path):
            return self.repo_api(m, mt[1], mt[2], mt[3], unquote(mt[4]) if mt[4] else None, mt[4], body, base)
        if mt := re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve_file(mt[1] or "models", mt[2], unquote(mt[3]), unquote(mt[4]), base)
        self.err(404, None, f"no route {m} {path}")

    def repo(self, rtype, rid, write=False) -> Repo | None:
        r = self.state.repos.get((rtype, rid))
        if r is None or (r.private and not self._authed()):
            self.err(404 if self._authed() else 401, "RepoNotFound", "Repository not found")
            return None
        if write and self._need_auth():
            return None
        return r

    def commit_of(self, r: Repo, rev) -> Commit | None:
        c = r.resolve(rev or "main")
        if c is None:
            self.err(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return c

    # ---- repos ----------------------------------------------------------------------------------
    def create_repo(self, d, base):
        if self._need_auth():
            return
        rtype = (d.get("type") or "model") + "s"
        rid = f"{d.get('organization') or self.state.user}/{d['name']}"
        url = f"{base}/{PREFIX[rtype]}{rid}"
        if (rtype, rid) in self.state.repos:  # client with exist_ok=True still reads ["url"] from this body
            return self.err(409, None, "You already created this model repo", url=url)
        r = Repo(rtype, rid, private=d.get("visibility") == "private" or bool(d.get("private")))
        ga = "\n".join(f"{p} filter=lfs diff=lfs merge=lfs -text" for p in LFS_PATTERNS).encode() + b"\n"
        c = r.add(None, "initial commit", "", {".gitattributes": Entry(git_blob(ga), len(ga), None, ga)})
        r.branches["main"] = c.oid
        self.state.repos[rtype, rid] = r
        self.send(obj={"url": url, "name": rid, "id": "0", "private": r.private})

    def delete_repo(self, d):
        if self._need_auth():
            return
        key = ((d.get("type") or "model") + "s", f"{d.get('organization') or self.state.user}/{d['name']}")
        if self.state.repos.pop(key, None) is None:
            return self.err(404, "RepoNotFound", "Repository not found")
        self.send(data=b"OK")

    def validate_yaml(self, d):
        """Real Hub validates much more; this checks what tests want to pin down."""
        import yaml

        errors, warnings = [], []
        mt = re.match(r"^(\s*---\r?\n)([\S\s]*?)(\r?\n---[ \t]*(\r?\n|$))", d["content"])
        if not mt:
            warnings.append(
                {
                    "message": "empty or missing yaml metadata in repo card (https://huggingface.co/docs/hub/model-cards#model-card-metadata)"
                }
            )
        else:
            try:
                meta = yaml.safe_load(mt[2]) or {}
                if "tags" in meta and not isinstance(meta["tags"], list):
                    errors.append({"message": '"tags" must be an array'})
                bad = [
                    b
                    for b in (
                        [meta["base_model"]]
                        if isinstance(meta.get("base_model"), str)
                        else meta.get("base_model") or []
                    )
                    if not re.fullmatch(r"[\w.\-]+/[\w.\-]+|[\w.\-]+", b)
                ]
                if bad:
                    errors.append(
                        {
                            "message": f'"base_model" with value {bad[0]!r} is not valid. Use a model id from https://hf.co/models.'
                        }
                    )
            except yaml.YAMLError as e:
                errors.append({"message": f"YAML error: {e}"})
        self.send(400 if errors else 200, {"errors": errors, "warnings": warnings})

    def info(self, r: Repo, c: Commit):
        card = {}
        if "README.md" in c.tree:
            import yaml

            mt = re.match(
                r"^(\s*---\r?\n)([\S\s]*?)(\r?\n---[ \t]*(\r?\n|$))",
                (c.tree["README.md"].data or b"").decode("utf-8", "replace"),
            )
            card = (yaml.safe_load(mt[2]) or {}) if mt else {}
        blobs = self.q.get("blobs") in ("1", "true", "True")
        sib = []
        for p, e in sorted(c.tree.items()):
            s = {"rfilename": p}
            if blobs:
                s |= {"blobId": e.oid, "size": e.size}
                if e.sha256:
                    s["lfs"] = {"sha256": e.sha256, "size": e.size, "pointerSize": 130}
            sib.append(s)
        cfg = {}
        if "config.json" in c.tree and c.tree["config.json"].data:
            j = json.loads(c.tree["config.json"].data)
            cfg = {k: j[k] for k in ("architectures", "auto_map", "model_type") if k in j}
        tags = (
            list(card.get("tags") or [])
            + ([card["library_name"]] if card.get("library_name") else [])
            + (["custom_code"] if "auto_map" in cfg else [])
        )
        return {
            "_id": "0",
            "id": r.rid,
            "modelId": r.rid,
            "author": r.rid.split("/")[0],
            "sha": c.oid,
            "lastModified": c.date,
            "createdAt": c.date,
            "private": r.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": tags,
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
            "cardData": card or None,
            "config": cfg,
            "siblings": sib,
        }

    # ---- /api/models/{id}/... -------------------------------------------------------------------
    def repo_api(self, m, rtype, rid, verb, arg, rawarg, body, base):
        r = self.repo(rtype, rid, write=m != "GET" and verb not in ("paths-info",))
        if r is None:
            return

        def J():
            return json.loads(body or b"{}")

        if m == "GET" and verb in (None, "revision"):
            return (c := self.commit_of(r, arg)) and self.send(obj=self.info(r, c))
        if m == "GET" and verb == "tree":
            rev, _, sub = rawarg.partition("/")  # revision arrives url-quoted ("refs%2Fpr%2F1")
            c = self.commit_of(r, unquote(rev))
            return c and self.send(
                obj=self.tree(c, unquote(sub), self.q.get("recursive") in ("1", "true", "True")),
                headers={"X-Repo-Commit": c.oid},
            )
        if m == "POST" and verb == "paths-info":
            c = self.commit_of(r, arg)
            if c is None:
                return
            want = (
                J().get("paths")
                if "json" in self.headers.get("Content-Type", "")
                else parse_qs(body.decode()).get("paths", [])
            )
            return self.send(obj=[self.file_obj(p, c.tree[p]) for p in want if p in c.tree])
        if m == "GET" and verb == "refs":

            def ref(n, o, k):
                return {"name": n, "ref": f"refs/{k}/{n}", "targetCommit": o}

            out = {
                "branches": [ref(n, o, "heads") for n, o in r.branches.items()],
                "tags": [ref(n, o, "tags") for n, o in r.tags.items()],
                "converts": [],
            }
            if self.q.get("include_prs"):
                out["pullRequests"] = [{"name": n, "ref": n, "targetCommit": o} for n, o in r.prs.items()]
            return self.send(obj=out)
        if m == "GET" and verb == "commits":
            c, out = self.commit_of(r, arg), []
            if c is None:
                return
            while c:
                out.append(
                    {
                        "id": c.oid,
                        "title": c.title,
                        "message": c.message,
                        "date": c.date,
                        "authors": [{"user": self.state.user}],
                    }
                )
                c = r.commits.get(c.parent) if c.parent else None
            return self.send(obj=out)
        if verb == "branch" and m == "POST":
            if arg in r.branches:
                return self.err(409, None, "Reference already exists")
            c = self.commit_of(r, J().get("startingPoint") or "main")
            if c:
                r.branches[arg] = c.oid
                self.send(obj={})
            return
        if verb == "branch" and m == "DELETE":
            return (
                self.send(obj={}) if r.branches.pop(arg, None) else self.err(404, "RevisionNotFound", "no such branch")
            )
        if verb == "tag" and m == "POST":
            d = J()
            if d["tag"] in r.tags:
                return self.err(409, None, "Tag reference exists already")
            c = self.commit_of(r, arg)
            if c:
                r.tags[d["tag"]] = c.oid
                self.send(obj={})
            return
        if verb == "preupload" and m == "POST":
            c = self.commit_of(r, arg)
            if c is None:
                return
            d, out = J(), []
            lines = (d.get("gitIgnore") or "").splitlines()
            ign = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
            for f in d["files"]:
                name, e = f["path"].rsplit("/", 1)[-1], c.tree.get(f["path"])
                lfs = (
                    any(fnmatch.fnmatch(name, p) for p in LFS_PATTERNS)
                    or f["size"] > 10 * 2**20
                    or b"\0" in base64.b64decode(f.get("sample") or "")
                )
                out.append(
                    {
                        "path": f["path"],
                        "uploadMode": "lfs" if lfs else "regular",
                        "shouldIgnore": any(fnmatch.fnmatch(f["path"], p) or fnmatch.fnmatch(name, p) for p in ign),
                        "oid": (e.sha256 or e.oid) if e else None,
                    }
                )
            return self.send(obj={"files": out, "commitOid": c.oid})
        if verb == "commit" and m == "POST":
            return self.commit(r, arg, body, base)
        self.err(404, None, f"no repo route {m} {verb}")

    def file_obj(self, p, e):
        o = {"type": "file", "oid": e.oid, "size": e.size, "path": p}
        if e.sha256:
            o["lfs"] = {"oid": e.sha256, "size": e.size, "pointerSize": 130}
        return o

    def tree(self, c: Commit, sub, recursive):
        out, dirs = [], set()
        for p, e in sorted(c.tree.items()):
            if sub and not p.startswith(sub.rstrip("/") + "/"):
                continue
            rel = p[len(sub.rstrip("/")) + 1 :] if sub else p
            parts = rel.split("/")
            for i in range(1, len(parts)):
                if recursive or i == 1:
                    dirs.add((sub.rstrip("/") + "/" if sub else "") + "/".join(parts[:i]))
            if recursive or len(parts) == 1:
                out.append(self.file_obj(p, e))
        return [
            {"type": "directory", "oid": hashlib.sha1(d.encode()).hexdigest(), "size": 0, "path": d}
            for d in sorted(dirs)
        ] + out

    def commit(self, r: Repo, rev, body, base):
        parent = self.commit_of(r, rev)
        if parent is None:
            return
        tree, title, desc = dict(parent.tree), "", ""
        for line in body.splitlines():
            if not line.strip():
                continue
            o = json.loads(line)
            k, v = o["key"], o["value"]
            if k == "header":
                title, desc = v["summary"], v.get("description", "")
                if v.get("parentCommit") and not parent.oid.startswith(v["parentCommit"]):
                    return self.err(412, None, "A commit has happened since. Please refresh and try again.")
            elif k == "file":
                data = base64.b64decode(v["content"]) if v.get("encoding") == "base64" else v["content"].encode()
                tree[v["path"]] = Entry(git_blob(data), len(data), None, data)
            elif k == "lfsFile":
                blob = self.state.lfs.get(v["oid"])
                if blob is None:
                    return self.err(
                        400,
                        None,
                        f"Your push was rejected: an LFS pointer points to a missing file. {v['path']}",
                    )
                ptr = f"version https://git-lfs.github.com/spec/v1\noid sha256:{v['oid']}\nsize {len(blob)}\n".encode()
                tree[v["path"]] = Entry(git_blob(ptr), len(blob), v["oid"], None)
            elif k == "deletedFile":
                if tree.pop(v["path"], None) is None:
                    return self.err(404, "EntryNotFound", "A file with this name doesn't exist")
            elif k == "deletedFolder":
                for p in [p for p in tree if p.startswith(v["path"].rstrip("/") + "/")]:
                    del tree[p]
        c = r.add(parent, title, desc, tree)
        out = {
            "success": True,
            "commitOid": c.oid,
            "commitUrl": f"{base}/{PREFIX[r.rtype]}{r.rid}/commit/{c.oid}",
            "hookOutput": "",
        }
        if self.q.get("create_pr"):
            n = len(r.prs) + 1
            r.prs[f"refs/pr/{n}"] = c.oid
            out["pullRequestUrl"] = f"{base}/{PREFIX[r.rtype]}{r.rid}/discussions/{n}"
        elif rev in r.prs:
            r.prs[rev] = c.oid
        elif rev in r.branches:
            r.branches[rev] = c.oid
        else:
            return self.err(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        self.send(obj=out)

    # ---- LFS ------------------------------------------------------------------------------------
    def lfs_batch(self, rtype, rid, d, base):
        if self.repo(rtype, rid, write=True) is None:
            return
        objs = []
        for o in d["objects"]:
            e = {"oid": o["oid"], "size": o["size"]}
            if o["oid"] not in self.state.lfs:  # no "actions" == already present, client skips the PUT
                e["actions"] = {
                    "upload": {"href": f"{self.state.cdn_url}/_lfs/{o['oid']}", "header": {}},
                    "verify": {"href": f"{base}/_lfs/{o['oid']}/verify"},
                }
            objs.append(e)
        self.send(obj={"transfer": "basic", "objects": objs}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_blob(self, m, sha, body):
        if m == "PUT":
            if hashlib.sha256(body).hexdigest() != sha:
                return self.err(400, None, "sha256 mismatch")
            self.state.lfs[sha] = body
            return self.send(data=b"", headers={"ETag": f'"{sha}"'})
        if sha not in self.state.lfs:
            return self.err(404, None, "no such object")
        self.blob(self.state.lfs[sha], {"ETag": f'"{sha}"'})

    def blob(self, data, headers):
        rng = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if rng and self.command == "GET":
            a, b = int(rng[1]), int(rng[2]) if rng[2] else len(data) - 1
            return self.send(
                206, data=data[a : b + 1], headers=headers | {"Content-Range": f"bytes {a}-{b}/{len(data)}"}
            )
        self.send(data=data, headers=headers | {"Accept-Ranges": "bytes"})

    def resolve_file(self, rtype, rid, rev, path, base):
        r = self.repo(rtype, rid)
        if r is None:
            return
        if r.gated:
            return self.err(403, "GatedRepo", f"Access to model {rid} is restricted. You must be authenticated.")
        c = self.commit_of(r, rev)
        if c is None:
            return
        h = {"X-Repo-Commit": c.oid}
        e = c.tree.get(path)
        if e is None:  # X-Repo-Commit here lets the client cache .no_exist
            return self.err(404, "EntryNotFound", "Entry not found", headers=h)
        if e.sha256:
            # 302 to ANOTHER ORIGIN (scheme, host, port). huggingface_hub>=2 follows HEAD redirects that stay on
            # HF_ENDPOINT's origin, and then misses X-Repo-Commit/X-Linked-* => "does not appear to have a file ...".
            h |= {
                "X-Linked-Etag": f'"{e.sha256}"',
                "X-Linked-Size": str(e.size),
                "ETag": f'"{e.oid}"',
                "Location": f"{self.state.cdn_url}/_lfs/{e.sha256}",
            }
            return self.send(302, data=b"", headers=h)
        self.blob(e.data, h | {"ETag": f'"{e.oid}"'})


class HubServer:
    def __init__(self, port=0, **kw):
        self.state = HubState(**kw)
        handler = type("H", (Handler,), {"state": self.state})
        self.servers = [
            ThreadingHTTPServer(("127.0.0.1", p), handler) for p in (port, 0)
        ]  # Hub, and "CDN" (2nd origin)
        for s in self.servers:
            s.daemon_threads = True
        # Hosts that differ in name too: huggingface_hub 1.x tells them apart by that, 2.x by the port as well.
        hosts = ("127.0.0.1", "localhost")
        self.url, self.state.cdn_url = (
            f"http://{host}:{server.server_address[1]}" for host, server in zip(hosts, self.servers, strict=True)
        )

    def start(self):
        for s in self.servers:
            threading.Thread(target=s.serve_forever, daemon=True).start()
        return self

    def stop(self):
        for s in self.servers:
            s.shutdown()
            s.server_close()

    __enter__ = start

    def __exit__(self, *a):
        self.stop()

    def calls(self, since=0):
        return [
            (x["method"], x["path"] + ("?" + x["query"] if x["query"] else ""), x["status"])
            for x in self.state.log[since:]
        ]


if __name__ == "__main__":
    s = HubServer(int(sys.argv[1]) if len(sys.argv) > 1 else 0).start()
    print(s.url, flush=True)
    threading.Event().wait()
