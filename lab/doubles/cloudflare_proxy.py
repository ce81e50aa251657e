# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The edge as its visitors meet it: a reverse proxy that obeys the rules which the API double holds.

Visitors on loopback stand for documentation addresses, so that a thief, users and responders have addresses of their own.
"""

from __future__ import annotations

import http.client
import http.server
import ipaddress
import socketserver
import urllib.parse
from typing import Any

from lab.doubles.cloudflare_state import Edge

DOCUMENTATION = {"127.0.2.": "192.0.2.", "127.66.0.": "198.51.100.", "127.0.113.": "203.0.113."}
COUNTRIES = {"192.0.2.": "DE", "198.51.100.": "T1", "203.0.113.": "CH"}
UNKNOWN = "XX"
HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
OURS = HOP_BY_HOP | {"cf-connecting-ip", "cf-ipcountry", "x-forwarded-for", "content-length"}
CHALLENGES = {"managed_challenge", "js_challenge", "challenge"}


def visitor(source: str) -> str:
    """The address that a source on loopback stands for."""
    for prefix, documented in DOCUMENTATION.items():
        if source.startswith(prefix):
            return documented + source.removeprefix(prefix)
    return source


def country(address: str) -> str:
    return next((code for prefix, code in COUNTRIES.items() if address.startswith(prefix)), UNKNOWN)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    timeout = 60
    server: Proxy

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = visitor(self.client_address[0])
        action = self.server.edge.verdict(self._request(address))
        if action == "pass":
            self._forward(address, body)
            return
        challenge = {"Cf-Mitigated": "challenge"} if action in CHALLENGES else {}
        self._send(403, f"<html><body>{action}</body></html>".encode(), {"Content-Type": "text/html", **challenge})

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET

    def _request(self, address: str) -> dict[str, Any]:
        url = urllib.parse.urlsplit(self.path)
        code, host = country(address), self.headers.get("Host", "").partition(":")[0]
        return {
            "ip.src": ipaddress.ip_address(address),
            "ip.src.country": code,
            "ip.geoip.country": code,
            "ip.src.continent": "T1" if code == "T1" else "EU",
            "ip.src.asnum": 64496,
            "http.host": host,
            "http.referer": self.headers.get("Referer", ""),
            "http.cookie": self.headers.get("Cookie", ""),
            "http.user_agent": self.headers.get("User-Agent", ""),
            "http.request.full_uri": f"http://{host}{self.path}",
            "http.request.method": self.command,
            "http.request.uri": self.path,
            "http.request.uri.path": url.path,
            "http.request.uri.query": url.query,
            "ssl": False,
        }

    def _forward(self, address: str, body: bytes) -> None:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in OURS}
        headers |= {"CF-Connecting-IP": address, "CF-IPCountry": country(address), "X-Forwarded-For": address}
        if body or self.command in ("POST", "PUT", "PATCH"):
            headers["Content-Length"] = str(len(body))
        origin = http.client.HTTPConnection(self.server.origin, timeout=30)
        try:
            origin.request(self.command, self.path, body or None, headers)
            answer = origin.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException):
            self._send(502, b"<html><body>502 Bad Gateway</body></html>", {"Content-Type": "text/html"})
            return
        finally:
            origin.close()
        kept = {
            name: value for name, value in answer.getheaders() if name.lower() not in HOP_BY_HOP | {"content-length"}
        }
        self._send(answer.status, content, kept)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_args: Any) -> None:
        pass


class Proxy(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, port: int, edge: Edge, origin: str) -> None:
        self.edge, self.origin = edge, urllib.parse.urlsplit(origin).netloc
        super().__init__(("127.0.0.1", port), Handler)

    def handle_error(self, *_args: Any) -> None:
        """A visitor who went away is no news."""
