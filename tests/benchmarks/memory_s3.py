"""An S3 server that keeps objects in memory, for measurements: moto needs a second for a page of 1,000 names.

    python -m tests.benchmarks.memory_s3 PORT LATENCY_S

It knows what pyarrow asks for: buckets, objects with ranges, multipart uploads, listings. It
checks no signature. Every request waits for the added latency first.
"""

from __future__ import annotations

import asyncio
import bisect
import hashlib
import sys
import time
from collections.abc import Iterator, Mapping
from email.utils import formatdate
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import uvicorn

PAGE = 1000


class Stored(NamedTuple):
    data: bytes
    etag: str
    modified: float


class Answer(NamedTuple):
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = {}


def refusal(status: int, code: str) -> Answer:
    return Answer(status, f"<Error><Code>{code}</Code></Error>".encode(), {"content-type": "application/xml"})


def xml(name: str, content: str) -> Answer:
    text = f'<{name} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{content}</{name}>'
    return Answer(200, text.encode(), {"content-type": "application/xml"})


def unchunk(body: bytes) -> bytes:
    """The content of an aws-chunked body: size in hexadecimal, data, and so on; trailers are ignored."""
    content, position = b"", 0
    while True:
        end = body.index(b"\r\n", position)
        size = int(body[position:end].split(b";")[0], 16)
        if not size:
            return content
        content += body[end + 2 : end + 2 + size]
        position = end + size + 4


class Store:
    """Objects of all buckets by "bucket/key". `names` is sorted, for listings."""

    def __init__(self) -> None:
        self.objects: dict[str, Stored] = {}
        self.names: list[str] = []
        self.uploads: dict[str, dict[int, bytes]] = {}

    def answer(self, method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> Answer:
        bucket, _, key = path.lstrip("/").partition("/")
        if method == "POST" and "delete" in query:
            for element in ElementTree.fromstring(body).iter():
                if element.tag.endswith("Key"):
                    self.remove(f"{bucket}/{element.text}")
            return xml("DeleteResult", "")
        if not key:
            return self.list(bucket, query) if method == "GET" else Answer()
        if method in ("GET", "HEAD"):
            return self.read(path.lstrip("/"), headers, method == "HEAD")
        if method == "DELETE":
            self.remove(path.lstrip("/"))
            return Answer(204)
        if "aws-chunked" in headers.get("content-encoding", ""):
            body = unchunk(body)
        if method == "POST" and "uploads" in query:
            upload = str(len(self.uploads))
            self.uploads[upload] = {}
            names = f"<Bucket>{bucket}</Bucket><Key>{escape(key)}</Key>"
            return xml("InitiateMultipartUploadResult", f"{names}<UploadId>{upload}</UploadId>")
        if method == "PUT" and "partNumber" in query:
            self.uploads[query["uploadId"]][int(query["partNumber"])] = body
            return Answer(headers={"etag": f'"{hashlib.md5(body).hexdigest()}"'})
        if method == "POST" and "uploadId" in query:
            parts = self.uploads.pop(query["uploadId"])
            stored = self.write(path.lstrip("/"), b"".join(parts[number] for number in sorted(parts)))
            return xml("CompleteMultipartUploadResult", f"<Key>{escape(key)}</Key><ETag>{stored.etag}</ETag>")
        if method == "PUT":
            return Answer(headers={"etag": self.write(path.lstrip("/"), body).etag})
        return refusal(501, "NotImplemented")

    def write(self, name: str, data: bytes) -> Stored:
        if name not in self.objects:
            bisect.insort(self.names, name)
        self.objects[name] = Stored(data, f'"{hashlib.md5(data).hexdigest()}"', time.time())
        return self.objects[name]

    def remove(self, name: str) -> None:
        if self.objects.pop(name, None):
            del self.names[bisect.bisect_left(self.names, name)]

    def read(self, name: str, headers: dict[str, str], head: bool) -> Answer:
        stored = self.objects.get(name)
        if stored is None:
            return Answer(404) if head else refusal(404, "NoSuchKey")
        facts = {"etag": stored.etag, "last-modified": formatdate(stored.modified, usegmt=True)}
        if head or "range" not in headers:
            return Answer(200, b"" if head else stored.data, facts | {"content-length": str(len(stored.data))})
        first, _, last = headers["range"].removeprefix("bytes=").partition("-")
        data = stored.data[int(first) : int(last) + 1 if last else None]
        facts["content-range"] = f"bytes {first}-{int(first) + len(data) - 1}/{len(stored.data)}"
        return Answer(206, data, facts)

    def list(self, bucket: str, query: dict[str, str]) -> Answer:
        """A page of the names behind `continuation-token`; those below a delimiter appear as one common prefix."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        rows: list[str] = []
        entry = after = query.get("continuation-token", "")
        more = False
        for key in self._keys(bucket, prefix, after):
            cut = key.find(delimiter, len(prefix)) + 1 if delimiter else 0
            if cut and key[:cut] == entry:
                continue
            if more := len(rows) == PAGE:
                break
            entry = key[:cut] or key
            rows.append(
                f"<CommonPrefixes><Prefix>{escape(entry)}</Prefix></CommonPrefixes>" if cut else self._row(bucket, key)
            )
        rows.append(f"<KeyCount>{len(rows)}</KeyCount><IsTruncated>{str(more).lower()}</IsTruncated>")
        if more:
            rows.append(f"<NextContinuationToken>{escape(entry)}</NextContinuationToken>")
        return xml("ListBucketResult", "".join(rows))

    def _keys(self, bucket: str, prefix: str, after: str) -> Iterator[str]:
        for position in range(bisect.bisect_left(self.names, f"{bucket}/{max(prefix, after)}"), len(self.names)):
            key = self.names[position].removeprefix(f"{bucket}/")
            if len(key) == len(self.names[position]) or not key.startswith(prefix):
                return
            if key > after:
                yield key

    def _row(self, bucket: str, key: str) -> str:
        stored = self.objects[f"{bucket}/{key}"]
        day = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(stored.modified))
        facts = f"<LastModified>{day}</LastModified><ETag>{stored.etag}</ETag><Size>{len(stored.data)}</Size>"
        return f"<Contents><Key>{escape(key)}</Key>{facts}</Contents>"


def app(latency_s: float) -> Any:
    """The server as an ASGI application."""
    store = Store()

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        body += message.get("body", b"")
        await asyncio.sleep(latency_s)
        query = dict(parse_qsl(scope["query_string"].decode(), keep_blank_values=True))
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        answer = store.answer(scope["method"], unquote(scope["path"]), query, headers, body)
        lines = {"content-length": str(len(answer.body)), **answer.headers}
        start = [(name.encode(), value.encode()) for name, value in lines.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": start})
        await send({"type": "http.response.body", "body": answer.body})

    return serve


if __name__ == "__main__":
    uvicorn.run(app(float(sys.argv[2])), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", lifespan="off")
