"""Shared fixtures: tiny networks, a Hub on loopback, and fresh processes that run the real client against it."""

import base64
import hashlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mini_ddpm

TOKEN = "hf_loopback"
READ_TOKEN = "hf_readonly"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
# Settings of the short runs in the tests of training.
SHORT_RUN = {
    "train_batch_size": 4,
    "save_images_epochs": 0,
    "log_with": "none",
    "device": "cpu",
    "mixed_precision": "no",
}


def weights(folder):
    """The weights of a pipeline's network by name."""
    return load_file(Path(folder) / WEIGHTS)


def assert_equal_weights(folder, other):
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    assert [key for key, tensor in ours.items() if not torch.equal(tensor, theirs[key])] == []


@pytest.fixture(scope="session")
def tiny_unet():
    """Make networks of a few thousand parameters. No parameter is zero, so that each one affects the image."""

    def make(**overrides):
        torch.manual_seed(0)
        config = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "num_class_embeds": 11, "patch_size": 2}
        config |= {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
        unet = mini_ddpm.MiniUNet2DModel(**(config | overrides)).eval()
        for parameter in unet.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        return unet

    return make


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Sixteen grey 8x8 pictures in two classes: bright squares in the left or in the right half."""
    root = tmp_path_factory.mktemp("pictures")
    for index in range(16):
        name = ("left", "right")[index % 2]
        pixels = np.zeros((8, 8), dtype=np.uint8)
        row, column = index // 4, index // 2 % 2 + 4 * (index % 2)
        pixels[row : row + 4, column : column + 3] = 255
        (root / name).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / name / f"{index:02d}.png")
    return root


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path):
    return path.endswith((".safetensors", ".bin"))


def oid(path, content):
    """Return the hash by which the Hub names a file: SHA-256 in large file storage, else that of its git blob."""
    return hashlib.sha256(content).hexdigest() if is_lfs(path) else git_oid(content)


class LoopbackHub:
    """A Hub in memory, with the part of the protocol that uploads and downloads of a model use.

    `files(repo)` returns the files at a revision. The token `TOKEN` can write to repositories of `user` and open pull
    requests in others; `READ_TOKEN` can only read. `fail("PUT /lfs/", status=403)` fails all requests whose
    "METHOD /path" starts so. `damage="truncate"` or `"flip"` corrupts the body of the answers instead, and `times` is
    the number of requests affected (default: all). Other processes call it with `POST /_fail`.
    """

    def __init__(self):
        self.repos = {}  # id -> {"private": bool, "refs": {name: sha}, "commits": {sha: {path: bytes}}}
        self.lfs = {}
        self.messages = []  # titles of the commits
        self.failure = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def handle_any(self):
                url = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if url.path == "/_fail":
                    hub.fail(**json.loads(body))
                    return self.reply(200, {})
                damage = hub.failing(f"{self.command} {url.path}")
                if isinstance(damage, int):
                    return self.reply(damage, {"error": "fault"})
                try:
                    answer = hub.answer(self.command, url.path, url.query, body, self.headers)
                except HubError as error:
                    names = {"X-Error-Message": error.message} if error.message else {"X-Error-Code": error.code}
                    return self.reply(error.status, {"error": error.code}, names)
                return self.reply(*answer, damage=damage)

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

            def reply(self, status, content, headers=None, damage=None):
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                if damage == "truncate":
                    content = content[: len(content) // 2]
                    self.close_connection = True
                elif damage == "flip":
                    content = content[:-1] + bytes([content[-1] ^ 1])
                if self.command != "HEAD":
                    self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def fail(self, start=None, status=None, damage=None, times=-1):
        self.failure = {"start": start, "how": status or damage, "times": times} if start else {}

    def failing(self, request):
        failure = self.failure
        if not failure or failure["times"] == 0 or not request.startswith(failure["start"]):
            return None
        failure["times"] -= 1
        return failure["how"]

    def commit(self, repo_id, files, ref="main"):
        """Set the files of a reference. The commit is named by their hash, which is returned."""
        repo = self.repos.setdefault(repo_id, {"private": False, "refs": {}, "commits": {}})
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        repo["commits"][sha] = dict(files)
        repo["refs"][ref] = sha
        return sha

    def files(self, repo_id, ref="main"):
        repo = self.repos[repo_id]
        return repo["commits"][repo["refs"].get(ref, ref)]

    def answer(self, method, path, query, body, headers):
        if path.startswith("/lfs/"):  # the storage service takes any upload
            self.lfs[path.removeprefix("/lfs/")] = body
            return 200, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        token = (headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", TOKEN, READ_TOKEN):
            raise HubError(401, "Unauthorized", "Invalid credentials in Authorization header")
        if method != "GET" and method != "HEAD" and token != TOKEN:
            raise HubError(403 if token else 401, "Forbidden", "You have no right to write")
        segments = [unquote(segment) for segment in path.split("/")[1:]]
        data = json.loads(body) if body.startswith((b"{", b"[")) and "commit" not in segments else {}
        if path == "/api/repos/create":
            repo_id = f"{data.get('organization') or 'user'}/{data['name']}"
            if repo_id not in self.repos:
                if not repo_id.startswith("user/"):
                    raise HubError(403, "Forbidden", "You are no member of it")
                self.commit(repo_id, {".gitattributes": b""})
                self.repos[repo_id]["private"] = bool(data.get("private") or data.get("visibility") == "private")
                return 200, {"url": f"{self.url}/{repo_id}", "id": repo_id, "name": repo_id}
            return 409, {"url": f"{self.url}/{repo_id}", "id": repo_id, "name": repo_id}
        if path.endswith("/info/lfs/objects/batch"):
            uploads = [
                item if item["oid"] in self.lfs else
                {**item, "actions": {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}} for item in data["objects"]
            ]  # fmt: skip
            return 200, {"transfer": "basic", "objects": uploads}

        segments = segments[2:] if segments[:2] == ["api", "models"] else segments
        repo_id, (action, ref, *rest) = "/".join(segments[:2]), (*segments[2:], *[None] * (4 - len(segments)))
        repo = self.repos.get(repo_id)
        if repo is None or (repo["private"] and not token):
            raise HubError(404 if token else 401, "RepoNotFound")
        ref, file = ref or "main", "/".join(rest) if rest and rest[0] else None
        if action in ("branch", "tag"):
            name, start = (ref, data.get("startingPoint") or "main") if action == "branch" else (data["tag"], ref)
            status = 409 if name in repo["refs"] else 200
            repo["refs"].setdefault(name, repo["refs"].get(start, start))
            return status, {}
        sha = repo["refs"].get(ref, ref)
        if sha not in repo["commits"]:
            raise HubError(404, "RevisionNotFound")
        files = repo["commits"][sha]
        if action == "preupload":
            answers = []
            for path in (item["path"] for item in data["files"]):
                known = {"oid": oid(path, files[path])} if path in files else {}
                mode = "lfs" if is_lfs(path) else "regular"
                answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
            return 200, {"files": answers}
        if action in (None, "revision"):
            siblings = [{"rfilename": name} for name in sorted(files)]
            info = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": sha, "siblings": siblings}
            return 200, {**info, "private": repo["private"], "tags": [], "downloads": 0, "likes": 0}
        if action == "tree":
            return 200, [
                {"type": "file", "path": name, "size": len(content), "oid": git_oid(content)}
                | (
                    {"lfs": {"oid": oid(name, content), "size": len(content), "pointerSize": 1}}
                    if is_lfs(name)
                    else {}
                )
                for name, content in sorted(files.items())
            ]
        if action == "commit":
            is_pr = "create_pr=1" in query
            if not (is_pr or ref.startswith("refs/pr/") or repo_id.startswith("user/")):
                raise HubError(403, "Forbidden", "You are no member of it")
            changed = dict(files)
            for entry in map(json.loads, body.splitlines()):
                value = entry["value"]
                if entry["key"] == "header":
                    self.messages.append(value["summary"])
                elif entry["key"] == "file":
                    changed[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    changed[value["path"]] = self.lfs[value["oid"]]
                elif entry["key"] == "deletedFile":
                    del changed[value["path"]]
            number = 1 + sum(name.startswith("refs/pr/") for name in repo["refs"])
            sha = self.commit(repo_id, changed, f"refs/pr/{number}" if is_pr else ref)
            answer = {"commitUrl": f"{self.url}/{repo_id}/commit/{sha}", "commitOid": sha}
            return 200, answer | ({"pullRequestUrl": f"{self.url}/{repo_id}/discussions/{number}"} if is_pr else {})
        if action == "resolve" and file in files:
            return 200, files[file], {"ETag": f'"{oid(file, files[file])}"', "X-Repo-Commit": sha}
        raise HubError(404, "EntryNotFound")


class HubError(Exception):
    def __init__(self, status, code, message=None):
        super().__init__(code)
        self.status, self.code, self.message = status, code, message


@pytest.fixture(scope="session")
def loopback_hub():
    hub = LoopbackHub()
    yield hub
    hub.close()


@pytest.fixture(scope="session")
def fresh_process(loopback_hub, tmp_path_factory):
    """Run Python code in a process of its own, with an empty cache, against the loopback Hub.

    With `package=False` the process cannot import `mini_ddpm`. Processes with the same directory `home` share a cache.
    `python` is the interpreter. Returns the last line that the code prints, parsed as JSON, in `.result`, and the
    output in `.stdout` and `.stderr`.
    """

    def run(code, package=True, home=None, token=TOKEN, python=sys.executable, **environment):
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
            [python, "-c", code], env=env | environment, cwd=home, capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            raise AssertionError(f"The process failed.\n{done.stdout}\n{done.stderr}")
        lines = done.stdout.splitlines()
        return SimpleNamespace(result=json.loads(lines[-1]) if lines else None, stdout=done.stdout, stderr=done.stderr)

    return run


@pytest.fixture
def two_processes():
    """Arguments for Python that run a module in two processes, connected through a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = ("--master-addr=127.0.0.1", f"--master-port={port}")
    return ("-m", "torch.distributed.run", "--nproc-per-node=2", *address)


@pytest.fixture
def interrupt(monkeypatch):
    """Make a method of a class raise `KeyboardInterrupt` at one of its calls; those after it work again."""

    def patch(cls, name, call):
        method, left = getattr(cls, name), [call]

        def cut_off(self, *args):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return method(self, *args)

        monkeypatch.setattr(cls, name, cut_off)

    return patch


@pytest.fixture(scope="session")
def benchmark():
    """Import a script of benchmarks/ by name."""

    def load(name):
        file = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, file)
        # Registered, because dataclasses look up the module of their annotations.
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
