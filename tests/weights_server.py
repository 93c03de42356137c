"""A server on localhost for the tests of fetching: serves bytes, faults, and part of the Hub."""

import base64
import contextlib
import http.server
import json
import threading
import time


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; `faults` maps a path to a misbehaviour; `log` holds the requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {}
        self.faults = {}
        self.log = []
        self.tokens = []
        self.repositories = {}
        self.commits = {}  # repository -> commit, as the Hub lists it
        self.headers = {}  # path -> headers of the answer

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def count(self, text):
        return sum(text in line for line in self.log)

    def handle_error(self, request, client_address):
        """Clients that are killed half-way are part of the tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format, *args):
        pass

    def answer(self, status, body=b"", headers=()):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value, status=200):
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.log.append(f"GET {path}")
        self.server.tokens.append(self.headers.get("Authorization"))
        fault = self.server.faults.get(path)
        if isinstance(fault, int):
            return self.answer(fault)
        headers = self.server.headers.get(path, {})
        if isinstance(fault, str):
            return self.answer(302, headers={"Location": fault, **headers})
        body = self.server.files.get(path)
        if path.startswith("/api/models/"):
            return self.model(path.removeprefix("/api/models/"))
        if body is None:
            return self.answer(404)
        if fault is None:
            return self.answer(200, body, headers)
        return fault(self, body)

    do_HEAD = do_GET

    # The Hub.

    def model(self, path):
        repository = path.partition("/revision/")[0]
        files = self.server.repositories.get(repository)
        if files is None:
            return self.answer(404)
        siblings = [{"rfilename": name} for name in sorted(files)]
        listing = {"id": repository, "siblings": siblings}
        if repository in self.server.commits:
            listing["sha"] = self.server.commits[repository]
        return self.answer_json(listing)

    def do_POST(self):
        self.server.log.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            request = json.loads(body)
            name = request["name"]
            if request.get("organization"):
                name = f"{request['organization']}/{name}"
            self.server.repositories.setdefault(name, {})
            return self.answer_json({"url": f"{self.server.address}/{name}", "name": name})
        if self.path == "/api/validate-yaml":
            return self.answer_json({"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            return self.answer_json({"files": modes})
        if self.path.endswith("/commit/main"):
            return self.commit(body)
        return self.answer(404)

    def commit(self, body):
        repository = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                value = entry["value"]
                content = base64.b64decode(value["content"])
                self.server.repositories[repository][value["path"]] = content
                address = f"/{repository}/resolve/main/{value['path']}"
                self.server.files[address] = content
        oid = "0" * 40
        return self.answer_json(
            {
                "commitUrl": f"{self.server.address}/{repository}/commit/{oid}",
                "commitOid": oid,
                "hookOutput": "",
            }
        )


def truncated(handler, body):
    """Declares the whole length and sends half."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.close_connection = True


def truncated_without_length(handler, body):
    """Sends half and closes, as a proxy may: only the contents tell."""
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.close_connection = True


def slow(handler, body):
    """Sends half, then waits: time to kill whoever is reading."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.wfile.flush()
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not getattr(handler.server, "go_on", False):
        time.sleep(0.02)
    with contextlib.suppress(OSError):
        handler.wfile.write(body[len(body) // 2 :])


def endless(handler, body):
    """Sends more than anybody wants."""
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.close_connection = True
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(b"\0" * (1 << 20))


@contextlib.contextmanager
def running():
    """Yields a server that runs in a thread."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.go_on = True
        server.shutdown()
        server.server_close()
        thread.join()
