"""A server on 127.0.0.1 with as much of W&B's protocol as runs and workspaces need; it remembers what it was sent."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "tester"
API_KEY = "k" * 40


@dataclass
class StoredRun:
    """One run as the server knows it."""

    fields: dict[str, Any] = field(default_factory=dict)
    """groupName, displayName, tags and so on, as last sent"""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None


class WandbServer:
    """Answers while the `with` block runs. `mode` may change at any time: ok, error (500 to all) or hang."""

    def __init__(self) -> None:
        self.mode = "ok"
        self.runs: dict[str, StoredRun] = {}
        self.views: dict[str, dict[str, Any]] = {}
        """id -> saved view as last sent; its `spec` is JSON"""
        self.uploads: dict[str, bytes] = {}
        self.stopped = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self._answers = {
            "upsertView(": self._upsert_view,
            "allViews(": self._all_views,
            "upsertBucket(": self._upsert_bucket,
            "createRunFiles(": self._create_run_files,
            "createArtifact(": self._create_artifact,
            "createArtifactManifest(": self._create_manifest,
            "createArtifactFiles(": self._create_artifact_files,
            "commitArtifact(": lambda _: {"commitArtifact": {"artifact": {"id": "a", "digest": "d"}}},
            "bucket(": self._bucket,
            "artifactType": lambda _: {"project": None},
            "viewer": self._viewer,
        }
        """part of the query -> what answers it"""
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self._http.shutdown()
        self._http.server_close()

    def answer(self, path: str, body: bytes) -> Any:
        """Return the JSON answer to a POST or PUT."""
        if path == "/graphql":
            request = json.loads(body)
            return {"data": self._graphql(request["query"], request.get("variables") or {})}
        if path.endswith("/file_stream"):
            self._file_stream(self.runs[path.split("/")[4]], json.loads(body))
        elif path.startswith("/upload/"):
            self.uploads[path.removeprefix("/upload/")] = body
        return {}

    def _graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        for name, answer in self._answers.items():
            if name in query:
                return answer(variables)
        return {}

    def _viewer(self, _: dict) -> dict:
        teams = {"edges": []}
        return {"viewer": {"id": "v", "entity": ENTITY, "username": "u", "email": "", "flags": "{}", "teams": teams}}

    def _bucket(self, variables: dict) -> dict:
        """Return what a resuming client asks for: nothing for a new run, else its last line and line counts."""
        run = self.runs.get(variables["name"])
        if run is None:
            return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": ENTITY}, "bucket": None}}
        tail = json.dumps([json.dumps(line) for line in run.history[-1:]])
        bucket = {
            "id": "b",
            "name": variables["name"],
            "summaryMetrics": json.dumps(run.summary),
            "displayName": run.fields.get("displayName"),
            "logLineCount": 0,
            "historyLineCount": len(run.history),
            "eventsLineCount": 0,
            "historyTail": tail,
            "eventsTail": "[]",
            "config": json.dumps(run.config),
            "tags": run.fields.get("tags"),
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": ENTITY}, "bucket": bucket}}

    def _upsert_bucket(self, variables: dict) -> dict:
        inserted = variables["name"] not in self.runs
        run = self.runs.setdefault(variables["name"], StoredRun())
        run.fields |= {key: value for key, value in variables.items() if value is not None}
        if variables.get("config"):
            run.config = json.loads(variables["config"])
        project = {"id": "p", "name": run.fields["project"], "entity": {"id": "e", "name": ENTITY}}
        bucket = {
            "id": "b",
            "name": variables["name"],
            "displayName": run.fields.get("displayName"),
            "description": None,
            "config": json.dumps(run.config),
            "sweepName": None,
            "historyLineCount": len(run.history),
            "project": project,
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _upsert_view(self, variables: dict) -> dict:
        """Overwrite the view of that id; without an id there is always a new one, whatever its name."""
        inserted = "id" not in variables
        key = f"view{len(self.views)}" if inserted else variables["id"]
        if not inserted and key not in self.views:
            return {"upsertView": None}
        self.views[key] = variables
        return {"upsertView": {"view": {"id": key, "name": variables["name"]}, "inserted": inserted}}

    def _all_views(self, variables: dict) -> dict:
        """Return the views of that name in a project; a project begins with its first run."""
        if variables["name"] not in {run.fields["project"] for run in self.runs.values()}:
            return {"project": None}
        asked = tuple(variables[key] for key in ("entityName", "projectName", "viewName", "viewType"))
        nodes = [
            {"id": key, "displayName": view["displayName"], "spec": view["spec"]}
            for key, view in self.views.items()
            if asked == tuple(view[name] for name in ("entityName", "projectName", "name", "type"))
        ]
        return {"project": {"allViews": {"edges": [{"node": node} for node in nodes]}}}

    def _create_run_files(self, variables: dict) -> dict:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}

    def _create_artifact(self, variables: dict) -> dict:
        sequence = {"id": "s", "latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": "a", "state": "PENDING", "artifactSequence": sequence}}}

    def _create_manifest(self, variables: dict) -> dict:
        file = {"id": "f", "name": "m", "uploadUrl": f"{self.url}/upload/manifest", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}

    def _create_artifact_files(self, variables: dict) -> dict:
        edges = []
        for spec in variables["input"]["artifactFiles"]:
            url = f"{self.url}/upload/artifact/{spec['name']}"
            upload = {"uploadUrl": url, "uploadHeaders": [], "uploadMultipartUrls": None}
            edges.append({"node": {"storagePath": spec["name"], "artifact": {"id": "a"}} | upload})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    @staticmethod
    def _file_stream(run: StoredRun, body: dict[str, Any]) -> None:
        for name, chunk in body.get("files", {}).items():
            lines = [json.loads(line) for line in chunk["content"]]
            if name == "wandb-history.jsonl":
                run.history[chunk["offset"] :] = lines
            elif name == "wandb-summary.json":
                run.summary = lines[-1]
        if body.get("complete"):
            run.exit_code = body["exitcode"]


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if server.mode == "hang":
                while server.mode == "hang" and not server.stopped.is_set():
                    time.sleep(0.05)
                self.close_connection = True
                return
            status = 500 if server.mode != "ok" else 200
            answer = json.dumps(server.answer(self.path, body) if status == 200 else {}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PUT = _serve

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:
                pass  # the client went away

    return Handler
