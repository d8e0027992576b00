"""Shared fixtures: tiny networks, a Hub on loopback, and fresh processes to drive it with the real client."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
import torch

import mini_ddpm

TOKEN = "hf_loopback"


@pytest.fixture(scope="session")
def tiny_unet():
    """Makes networks of a few thousand parameters, none of them zero, so that every part of them shows in an image."""

    def make(**overrides):
        torch.manual_seed(0)
        config = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "num_class_embeds": 11, "patch_size": 2}
        config |= {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
        unet = mini_ddpm.MiniUNet2DModel(**(config | overrides)).eval()
        for parameter in unet.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        return unet

    return make


class LoopbackHub:
    """The part of the Hub's protocol that uploading and downloading a model uses, in memory.

    `files(repo)` are the files at a revision. A `fault`, called with each request's method and path, may return a
    status code to answer it with.
    """

    def __init__(self):
        self.repos = {}  # id -> {"private": bool, "refs": {name: sha}, "commits": {sha: {path: bytes}}}
        self.lfs = {}
        self.log = []
        self.fault = lambda method, path: None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def handle_any(self):
                url = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.log.append((self.command, url.path))
                status = hub.fault(self.command, url.path)
                if status is not None:
                    return self.reply(status, {"error": "fault"})
                try:
                    answer = hub.answer(self.command, unquote(url.path), url.query, body, self.headers)
                except HubError as error:
                    return self.reply(error.status, {"error": error.code}, {"X-Error-Code": error.code})
                return self.reply(*answer)

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

            def reply(self, status, content, headers=None):
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo_id, files, ref="main"):
        """Sets the files of a reference, as a commit whose id is a hash of them."""
        repo = self.repos.setdefault(repo_id, {"private": False, "refs": {}, "commits": {}})
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        repo["commits"][sha] = dict(files)
        repo["refs"][ref] = sha
        return sha

    def files(self, repo_id, ref="main"):
        repo = self.repos[repo_id]
        return repo["commits"][repo["refs"].get(ref, ref)]

    def answer(self, method, path, query, body, headers):
        authorized = headers.get("Authorization") == f"Bearer {TOKEN}"
        if method in ("POST", "PUT") and not authorized and "/lfs/" not in path:
            raise HubError(401, "Unauthorized")
        data = json.loads(body) if body.startswith((b"{", b"[")) and path.split("/")[-2:-1] != ["commit"] else {}
        if path == "/api/whoami-v2":
            return 200, {"name": "user", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            repo_id = f"{data.get('organization') or 'user'}/{data['name']}"
            status = 409 if repo_id in self.repos else 200
            if status == 200:
                self.commit(repo_id, {})
                self.repos[repo_id]["private"] = bool(data.get("private"))
            return status, {"url": f"{self.url}/{repo_id}", "id": repo_id, "name": repo_id}
        if path.startswith("/lfs/"):
            self.lfs[path.removeprefix("/lfs/")] = body
            return 200, {}
        if match := re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            uploads = [
                {**item, "actions": {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}} for item in data["objects"]
            ]
            return 200, {"transfer": "basic", "objects": uploads}

        match = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+)(?:/([\w-]+)(?:/([^/]+))?(?:/(.+))?)?", path)
        repo_id, action, ref, file = match.groups() if match else (None, None, None, None)
        repo = self.repos.get(repo_id)
        if repo is None or (repo["private"] and not authorized):
            raise HubError(404 if authorized else 401, "RepoNotFound")
        if action == "refs":
            heads = [{"name": k, "ref": f"refs/heads/{k}", "targetCommit": v} for k, v in repo["refs"].items()]
            return 200, {"branches": heads, "converts": [], "tags": []}
        if action == "preupload":
            modes = {f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in data["files"]}
            answers = [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]
            return 200, {"files": answers}
        ref = ref or "main"
        sha = repo["refs"].get(ref, ref)
        if sha not in repo["commits"]:
            raise HubError(404, "RevisionNotFound")
        files = repo["commits"][sha]
        if action in (None, "revision"):
            siblings = [{"rfilename": name} for name in sorted(files)]
            info = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": sha, "siblings": siblings}
            return 200, {**info, "private": repo["private"], "tags": [], "downloads": 0, "likes": 0}
        if action == "tree":
            return 200, [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in sorted(files.items())
            ]
        if action == "commit":
            changed = dict(files)
            for entry in map(json.loads, body.splitlines()):
                value = entry["value"]
                if entry["key"] == "file":
                    changed[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    changed[value["path"]] = self.lfs[value["oid"]]
                elif entry["key"] == "deletedFile":
                    del changed[value["path"]]
            sha = self.commit(repo_id, changed, "refs/pr/1" if "create_pr=1" in query else ref)
            answer = {"commitUrl": f"{self.url}/{repo_id}/commit/{sha}", "commitOid": sha}
            return 200, answer | ({"pullRequestUrl": f"{self.url}/{repo_id}/discussions/1"} if "pr=1" in query else {})
        if action == "resolve" and file in files:
            etag = hashlib.sha256(files[file]).hexdigest()
            return 200, files[file], {"ETag": f'"{etag}"', "X-Repo-Commit": sha}
        raise HubError(404, "EntryNotFound")


class HubError(Exception):
    def __init__(self, status, code):
        super().__init__(code)
        self.status, self.code = status, code


@pytest.fixture(scope="session")
def loopback_hub():
    hub = LoopbackHub()
    yield hub
    hub.close()


@pytest.fixture(scope="session")
def fresh_process(loopback_hub, tmp_path_factory):
    """Runs Python code in a process of its own, with an empty cache, against the loopback Hub.

    `package=False` makes `import mini_ddpm` impossible there. `home` names a directory to share caches by. Returns the
    code's printed last line, as JSON, in `.result`, with `.stdout` and `.stderr`.
    """

    def run(code, package=True, home=None, token=TOKEN, **environment):
        home = Path(home or tmp_path_factory.mktemp("home"))
        env = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "OMP_NUM_THREADS") if name in os.environ}
        env |= {"HOME": str(home), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": loopback_hub.url}
        env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONIOENCODING": "utf-8"}
        if token is not None:
            env["HF_TOKEN"] = token
        if package:
            env["PYTHONPATH"] = str(Path(mini_ddpm.__file__).parents[1])
        else:
            code = "import sys\nsys.modules['mini_ddpm'] = None\n" + code
        done = subprocess.run(
            [sys.executable, "-c", code], env=env | environment, cwd=home, capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            raise AssertionError(f"The process failed.\n{done.stdout}\n{done.stderr}")
        lines = done.stdout.splitlines()
        return SimpleNamespace(result=json.loads(lines[-1]) if lines else None, stdout=done.stdout, stderr=done.stderr)

    return run
