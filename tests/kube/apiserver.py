"""A Kubernetes API server in memory: enough for the real helm and kubectl and for the operator's tool.

Faithful: discovery, create, read, list with selectors, update with resource versions, delete with
preconditions, watch, evictions, tunnels into pods, fields fixed at creation, the status codes of all these.
Not faithful: server-side apply (a merge), admission, validation, RBAC, garbage collection, controllers.
Whatever a controller would do, a test does by hand. Faults are injected through `faults`.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import yaml
from aiohttp import web

from kube.objects import (
    CLUSTER_WIDE,
    KINDS,
    PLURALS,
    RESOURCES,
    VERBS,
    Status,
    body,
    check_fixed,
    matches,
    merge,
)
from kube.tunnel import tunnel

Key = tuple[str, str, str, str]  # api version, plural, namespace, name


class ApiServer:
    """Use as a context manager.

    `faults` are asked before each request: one may answer, raise Status, or return None to let it through;
    `DROP` closes the connection without an answer.
    """

    DROP = web.Response(status=599)

    def __init__(self) -> None:
        self.objects: dict[Key, Any] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Callable[[str, str], web.Response | None]] = []
        self.pages: dict[tuple[str, int], Callable[[], str]] = {}  # (pod, port) -> HTTP body of /metrics
        self.logs: dict[tuple[str, str], str] = {}  # (pod, container) -> log
        self.backends: dict[tuple[str, int], tuple[str, int]] = {}  # (pod, port) -> real address
        self.missing: set[str] = set()  # API versions that are not served
        self._history: list[tuple[int, str, Any]] = []
        self._versions = itertools.count(1)
        self._version = 0
        self._lock = threading.RLock()
        self._changed = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fake API server")

    def __enter__(self) -> ApiServer:
        self._thread.start()
        assert self._started.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive()

    # What tests do directly

    def put(self, item: Any, namespace: str = "speech", **metadata: Any) -> Any:
        """Creates or replaces an object, as a controller would."""
        item = copy.deepcopy(item)
        plural = PLURALS[item["apiVersion"], item["kind"]]
        item["metadata"].update(metadata)
        if plural not in CLUSTER_WIDE:
            item["metadata"].setdefault("namespace", namespace)
        key = (item["apiVersion"], plural, item["metadata"].get("namespace", ""), item["metadata"]["name"])
        return self._store(key, item)

    def find(self, kind: str, name: str = "", namespace: str = "speech") -> list[Any]:
        with self._lock:
            return [
                copy.deepcopy(item)
                for key, item in self.objects.items()
                if item["kind"] == kind and key[2] in (namespace, "") and name in ("", key[3])
            ]

    def remove(self, kind: str, name: str, namespace: str = "speech") -> None:
        with self._lock:
            (key,) = (
                k for k, item in self.objects.items() if item["kind"] == kind and k[2:] == (namespace, name)
            )
            self._drop(key)

    def kubeconfig(self) -> str:
        return yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "fake",
                "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
                "users": [{"name": "fake", "user": {"token": "bearer-of-the-operator"}}],
                "contexts": [
                    {"name": "fake", "context": {"cluster": "fake", "user": "fake", "namespace": "speech"}}
                ],
            }
        )

    # Storage

    def _store(self, key: Key, item: Any) -> Any:
        with self._lock:
            old = self.objects.get(key)
            metadata = item["metadata"]
            metadata["resourceVersion"] = str(self._next())
            metadata.setdefault("uid", old["metadata"]["uid"] if old else str(uuid.uuid4()))
            metadata.setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
            changed = old is None or old.get("spec") != item.get("spec")
            generation = old["metadata"].get("generation", 0) if old else 0
            metadata["generation"] = generation + 1 if changed else generation
            self.objects[key] = item
            self._announce("ADDED" if old is None else "MODIFIED", item)
            return copy.deepcopy(item)

    def _drop(self, key: Key) -> None:
        with self._lock:
            item = self.objects.pop(key)
            item["metadata"]["resourceVersion"] = str(self._next())
            self._announce("DELETED", item)

    def _next(self) -> int:
        self._version = next(self._versions)
        return self._version

    def _announce(self, event: str, item: Any) -> None:
        self._history.append((self._version, event, copy.deepcopy(item)))
        self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # HTTP

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._started.set()
        await self._stop.wait()
        await runner.cleanup()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path))
        try:
            for fault in list(self.faults):
                answer = fault(request.method, request.path)
                if answer is self.DROP:
                    assert request.transport is not None
                    request.transport.close()
                    return web.Response()
                if answer is not None:
                    return answer
            return await self._route(request)
        except Status as error:
            return web.json_response(error.body, status=error.code)

    async def _route(self, request: web.Request) -> web.StreamResponse:
        parts = [part for part in request.path.split("/") if part]
        if parts == ["version"]:
            return web.json_response({"major": "1", "minor": "34", "gitVersion": "v1.34.0"})
        if parts in (["api"], ["apis"]):
            return web.json_response(self._groups(parts[0]))
        api = parts[1] if parts[0] == "api" else "/".join(parts[1:3])
        rest = parts[2:] if parts[0] == "api" else parts[3:]
        if api not in RESOURCES or api in self.missing:
            raise Status(404, "NotFound", f"the server could not find {request.path}")
        if not rest:
            return web.json_response(self._discovery(api))
        namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        plural, name, sub = (*rest, "", "")[:3]
        if (api, plural) not in KINDS:
            raise Status(404, "NotFound", f"no {plural} in {api}")
        return await self._resource(request, (api, plural, namespace, name), sub)

    async def _resource(self, request: web.Request, key: Key, sub: str) -> web.StreamResponse:
        name = key[3]
        if sub == "portforward":
            return await tunnel(request, name, self.pages, self.backends)
        if sub == "log":
            return self._log(key, request.query)
        if sub == "eviction":
            return self._evict(key, await request.json())
        if not name:
            if request.method == "POST":
                return self._create(key, await body(request))
            if request.query.get("watch") in ("true", "1"):
                return await self._watch(request, key)
            return web.json_response(self._list(key, request.query))
        if request.method == "GET":
            return web.json_response(self._get(key))
        if request.method == "DELETE":
            return self._delete(key, await body(request))
        return self._write(key, request, await body(request))

    def _get(self, key: Key) -> Any:
        with self._lock:
            if key not in self.objects:
                raise Status(404, "NotFound", f'{key[1]} "{key[3]}" not found')
            return copy.deepcopy(self.objects[key])

    def _log(self, key: Key, query: Any) -> web.Response:
        """The last `tailLines` lines, cut after `limitBytes`."""
        self._get(key)
        container = query["container"] + ("-previous" if query.get("previous") == "true" else "")
        if (key[3], container) not in self.logs:
            raise Status(400, "BadRequest", f'container "{container}" in pod "{key[3]}" is waiting to start')
        lines = self.logs[key[3], container].splitlines(keepends=True)[-int(query["tailLines"]) :]
        return web.Response(body="".join(lines).encode()[: int(query["limitBytes"])])

    def _list(self, key: Key, query: Any) -> Any:
        with self._lock:
            items = [copy.deepcopy(item) for item in self._selected(key, query)]
            return {
                "apiVersion": key[0],
                "kind": f"{KINDS[key[0], key[1]]}List",
                "metadata": {"resourceVersion": str(self._version)},
                "items": items,
            }

    def _selected(self, key: Key, query: Any) -> Iterator[Any]:
        for other, item in self.objects.items():
            if other[:2] == key[:2] and key[2] in ("", other[2]) and matches(item, query):
                yield item

    def _create(self, key: Key, item: Any) -> web.Response:
        key = (*key[:3], item["metadata"]["name"])
        with self._lock:
            if key in self.objects:
                raise Status(409, "AlreadyExists", f'{key[1]} "{key[3]}" already exists')
            item.setdefault("apiVersion", key[0])
            item.setdefault("kind", KINDS[key[0], key[1]])
            if key[2]:
                item["metadata"]["namespace"] = key[2]
            item["metadata"].pop("resourceVersion", None)
            if "helm.sh/hook" in item["metadata"].get("annotations", {}):
                item["status"] = {"phase": "Succeeded"}  # a test pod has run
            return web.json_response(self._store(key, item), status=201)

    def _write(self, key: Key, request: web.Request, change: Any) -> web.Response:
        """PUT, PATCH as merge, and server-side apply as create-or-merge."""
        applying = "apply-patch" in request.content_type
        with self._lock:
            old = self.objects.get(key)
            if old is None and not applying:
                raise Status(404, "NotFound", f'{key[1]} "{key[3]}" not found')
            if old is None:
                return self._create(key, change)
            wanted = change.get("metadata", {}).get("resourceVersion")
            if wanted and wanted != old["metadata"]["resourceVersion"]:
                raise Status(409, "Conflict", "the object has been modified")
            item = copy.deepcopy(change) if request.method == "PUT" else merge(copy.deepcopy(old), change)
            item["metadata"]["uid"] = old["metadata"]["uid"]
            check_fixed(old["kind"], old, item)
            return web.json_response(self._store(key, item))

    def _delete(self, key: Key, options: Any) -> web.Response:
        with self._lock:
            item = self._get(key)
            wanted = (options or {}).get("preconditions", {}).get("uid")
            if wanted and wanted != item["metadata"]["uid"]:
                raise Status(409, "Conflict", f"the UID in the precondition ({wanted}) does not match")
            self._drop(key)
        return web.json_response({"kind": "Status", "apiVersion": "v1", "status": "Success"})

    def _evict(self, key: Key, body: Any) -> web.Response:
        with self._lock:
            item = self._get(key)
            wanted = body.get("deleteOptions", {}).get("preconditions", {}).get("uid")
            if wanted and wanted != item["metadata"]["uid"]:
                raise Status(409, "Conflict", "the UID in the precondition does not match")
            if body.get("deleteOptions", {}).get("gracePeriodSeconds") == 0:
                self._drop(key)
            else:
                item["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
                self._store(key, item)
        return web.json_response({"kind": "Status", "apiVersion": "v1", "status": "Success"}, status=201)

    async def _watch(self, request: web.Request, key: Key) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "application/json"})
        await answer.prepare(request)
        since = int(request.query.get("resourceVersion") or 0)
        if request.query.get("sendInitialEvents") == "true":
            since = await self._initial_events(answer, key, request.query)
        end = self._loop.time() + float(request.query.get("timeoutSeconds", 5))
        while True:
            changed = self._changed
            with self._lock:
                news = [event for event in self._history if event[0] > since]
            for version, kind, item in news:
                since = version
                place = (item["apiVersion"], item["metadata"].get("namespace", ""))
                same = place[0] == key[0] and item["kind"] == KINDS[key[0], key[1]]
                if same and key[2] in ("", place[1]) and matches(item, request.query):
                    await answer.write(json.dumps({"type": kind, "object": item}).encode() + b"\n")
            try:
                await asyncio.wait_for(changed.wait(), end - self._loop.time())
            except asyncio.TimeoutError:
                return answer

    async def _initial_events(self, answer: web.StreamResponse, key: Key, query: Any) -> int:
        """What is there now, then the bookmark that says so; the version from which to go on."""
        with self._lock:
            version, items = self._version, [copy.deepcopy(item) for item in self._selected(key, query)]
        end = {"resourceVersion": str(version), "annotations": {"k8s.io/initial-events-end": "true"}}
        bookmark = {"apiVersion": key[0], "kind": KINDS[key[0], key[1]], "metadata": end}
        events = [("ADDED", item) for item in items] + [("BOOKMARK", bookmark)]
        for kind, item in events:
            await answer.write(json.dumps({"type": kind, "object": item}).encode() + b"\n")
        return version

    # Discovery

    def _groups(self, root: str) -> Any:
        if root == "api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        groups = []
        for api in RESOURCES:
            if "/" in api and api not in self.missing:
                version = {"groupVersion": api, "version": api.split("/")[1]}
                groups.append({"name": api.split("/")[0], "versions": [version], "preferredVersion": version})
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}

    def _discovery(self, api: str) -> Any:
        resources = [
            {
                "name": plural,
                "singularName": "",
                "kind": kind,
                "verbs": VERBS,
                "namespaced": plural not in CLUSTER_WIDE,
            }
            for (other, plural), kind in KINDS.items()
            if other == api
        ]
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api, "resources": resources}
