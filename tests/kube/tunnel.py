"""Tunnels into pods: the server's side of the port-forward protocol over WebSocket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from aiohttp import WSMsgType, web

Pages = Mapping[tuple[str, int], Callable[[], str]]  # (pod, port) -> HTTP body
Backends = Mapping[tuple[str, int], tuple[str, int]]  # (pod, port) -> real address


async def tunnel(request: web.Request, pod: str, pages: Pages, backends: Backends) -> web.StreamResponse:
    """The port-forward protocol: channel 0 carries bytes, channel 1 errors, each opened by the port."""
    port = int(request.query["ports"])
    socket = web.WebSocketResponse(protocols=["v5.channel.k8s.io", "v4.channel.k8s.io"])
    await socket.prepare(request)
    for channel in (b"\x00", b"\x01"):
        await socket.send_bytes(channel + port.to_bytes(2, "little"))
    if (pod, port) in backends:
        await _relay(socket, *backends[pod, port])
    elif (pod, port) in pages:
        await _page(socket, pages[pod, port])
    else:
        await socket.send_bytes(b"\x01" + f"nothing listens on {port} in {pod}".encode())
    await socket.close()
    return socket


async def _page(socket: web.WebSocketResponse, page: Callable[[], str]) -> None:
    request = b""
    while b"\r\n\r\n" not in request:
        message = await socket.receive()
        if message.type != WSMsgType.BINARY:
            return
        request += message.data[1:]
    body = page().encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
    await socket.send_bytes(b"\x00" + head + body)
    await socket.receive()  # the other side closes first, as HTTP clients do


async def _relay(socket: web.WebSocketResponse, host: str, port: int) -> None:
    reader, writer = await asyncio.open_connection(host, port)

    async def back() -> None:
        while data := await reader.read(65_536):
            await socket.send_bytes(b"\x00" + data)
        await socket.close()

    returning = asyncio.create_task(back())
    async for message in socket:
        if message.type == WSMsgType.BINARY and message.data[0] == 0:
            writer.write(message.data[1:])
    writer.close()
    returning.cancel()
    await asyncio.gather(returning, writer.wait_closed(), return_exceptions=True)
