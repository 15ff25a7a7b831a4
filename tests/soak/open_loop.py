"""A load generator in a process of its own: sends requests when their time has come, whether or not others have been
answered. `python open_loop.py JOB.json`; prints one JSON array of [status, seconds, Retry-After, text of the answer].

A job: {"host", "port", "path", "bodies": [text, ...], "at": [seconds, ...]}; status 0 is no answer at all.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any


async def one(job: dict[str, Any], body: bytes) -> tuple[int, float, str, str]:
    began = time.perf_counter()
    head = (
        f"POST {job['path']} HTTP/1.1\r\nHost: {job['host']}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    try:
        reader, writer = await asyncio.open_connection(job["host"], job["port"])
        writer.write(head.encode() + body)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
    except OSError as error:
        return 0, time.perf_counter() - began, "", repr(error)
    seconds = time.perf_counter() - began
    top, _, text = answer.partition(b"\r\n\r\n")
    lines = top.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    return int(lines[0].split()[1]) if top else 0, seconds, headers.get("retry-after", ""), text.decode()


async def main(job: dict[str, Any]) -> list[tuple[int, float, str, str]]:
    began = time.perf_counter()
    asked = []
    for at, body in zip(job["at"], job["bodies"], strict=True):
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        asked.append(asyncio.create_task(one(job, body.encode())))
    return list(await asyncio.gather(*asked))


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(json.loads(Path(sys.argv[1]).read_text())))))
