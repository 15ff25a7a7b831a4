"""The doctor: plays CVAT against a server of ours, then asks CVAT itself, and says what to do.

    python -m backends.cvat_nuclio.doctor              the gateway on this machine
    doctor --server http://gateway:8070                another one; or a function, such as http://127.0.0.1:8080
    doctor --cvat https://cvat.example.org --task 7    and CVAT too (CVAT_URL, CVAT_ACCESS_TOKEN): one click through all

Nothing is changed anywhere. Exit status 0: everything that was looked at is in order.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import httpx
import numpy as np

from backends.common.http import FetchError, RequestError
from backends.common.settings import Settings, load_settings
from backends.cvat_nuclio import contract
from backends.cvat_nuclio.server_version import SHAPES_SINCE, about
from inter2former.errors import Inter2FormerError
from inter2former.masks import rgb_to_png

NAME = "inter2former"
SLOW_S = 20.0  # CVAT's own functions are cut off after 30
HEADERS = {  # what CVAT's server sends to a dashboard
    "x-nuclio-project-name": "cvat",
    "x-nuclio-function-namespace": "nuclio",
    "x-nuclio-invoke-via": "domain-name",
    "X-Nuclio-Invoke-Timeout": "120s",
}


class Finding(NamedTuple):
    """One line of the report. ok is None for what could not be looked at."""

    name: str
    ok: bool | None
    text: str
    fix: str = ""

    def __str__(self) -> str:
        mark = {True: "ok  ", False: "FAIL", None: "    "}[self.ok]
        return f"{mark} {self.name}: {self.text}" + (f"\n     fix: {self.fix}" if self.fix else "")


class _Wrong(Exception):
    """What a page or CVAT's server would stumble over."""


# -- our server -------------------------------------------------------------------------------------------------------


def check_server(url: str) -> Iterator[Finding]:
    """A gateway, a dashboard with our function, or the function itself, asked as CVAT's server asks."""
    with httpx.Client(base_url=url.rstrip("/"), timeout=120, headers=HEADERS) as client:
        try:
            client.get("/health", timeout=5)
        except httpx.HTTPError as problem:
            yield Finding(
                "server", False, f"{url} cannot be reached ({type(problem).__name__})",
                "start it: python -m backends.cvat_nuclio.gateway --host 0.0.0.0 --port 8070; "
                "from another machine, its port must be open",
            )  # fmt: skip
            return
        listing = client.get("/api/functions")
        is_dashboard = listing.status_code == 200 and "application/json" in listing.headers.get("Content-Type", "")
        is_dashboard = is_dashboard and "status" not in listing.json()
        if is_dashboard:
            yield Finding("server", True, f"{url} answers as a nuclio dashboard")
            yield from _check_listing(client, listing.json())
        else:
            yield Finding("server", True, f"{url} answers as the function itself, not as a dashboard")
        yield from _check_clicks(client, _invoker(client, is_dashboard))


def _invoker(client: httpx.Client, is_dashboard: bool) -> Callable[[bytes], httpx.Response]:
    path = "/api/function_invocations" if is_dashboard else "/"
    headers = {"x-nuclio-function-name": NAME, "x-nuclio-path": "/", "Content-Type": "application/json"}
    return lambda body: client.post(path, content=body, headers={**headers, "Accept-Encoding": "gzip, deflate"})


def _check_listing(client: httpx.Client, listing: Any) -> Iterator[Finding]:
    broken = []
    for name, entry in listing.items() if isinstance(listing, dict) else ():
        try:
            contract.annotations_of(entry)
        except RequestError as wrong:
            broken.append(f"{name}: {wrong}")
    if not isinstance(listing, dict):
        yield Finding("functions", False, "the list is no object {name: function}", "is this a nuclio dashboard?")
    elif broken:
        yield Finding(
            "functions", False, "CVAT's models page will answer 500: " + "; ".join(broken),
            "remove what is half deployed: nuctl delete function NAME --platform local",
        )  # fmt: skip
    elif NAME not in listing:
        yield Finding(
            "functions", False, f"{len(listing)} functions, none of them {NAME}",
            "deploy it (nuctl deploy, see docs/cvat.md), or start the gateway and give this dashboard as --upstream",
        )  # fmt: skip
    else:
        read = contract.annotations_of(listing[NAME])
        wanted = {"type": "interactor", "version": "2", "min_pos_points": "0", "min_neg_points": "0"}
        differs = {key: read.get(key) for key, value in wanted.items() if read.get(key) != value}
        one = client.get(f"/api/functions/{NAME}")
        if differs:
            yield Finding("functions", False, f"annotations differ: {differs}", f"they have to be {wanted}")
        elif one.status_code != 200 or client.get("/api/functions/no-such-function").status_code != 404:
            yield Finding("functions", False, "single functions are not answered as a dashboard does", "update it")
        else:
            yield Finding("functions", True, f"{NAME} among {len(listing)}")


def _check_clicks(client: httpx.Client, invoke: Callable[[bytes], httpx.Response]) -> Iterator[Finding]:
    """One click and an undo on a picture that no server has seen before, and what must not be an error."""
    height, width, (x, y) = 480, 640, (320, 240)
    image = _picture(height, width)
    first = _timed(lambda: invoke(_body(image, [(x, y)])))
    try:
        mask, form = _read(first[0], height, width)
        if not mask[y, x]:
            raise _Wrong("the clicked pixel is not in the mask")
    except _Wrong as wrong:
        yield Finding("click", False, str(wrong), "look at the server's log; GET /health")
        return
    slow = first[1] > SLOW_S
    yield Finding(
        "click", not slow, f"{first[1]:.2f} s with encoding, answer as {form}, {int(mask.sum())} pixels",
        "give the server more cores, or a smaller I2F_MODEL_SIZE" if slow else "",
    )  # fmt: skip
    second = _timed(lambda: invoke(_body(image, [(x, y), (x + 60, y)], [(20, 20)])))
    undone = invoke(_body(image, [(x, y)]))
    try:
        more, _ = _read(second[0], height, width)
        again, _ = _read(undone, height, width)
        if not more[y, x + 60] or more[20, 20] or not np.array_equal(again, mask):
            raise _Wrong("a second click or its undo gave a wrong mask")
        yield Finding("next click and undo", True, f"{second[1] * 1000:.0f} ms, the undone mask is the first again")
    except _Wrong as wrong:
        yield Finding("next click and undo", False, str(wrong), "update the server")
    empty = invoke(_body(image, [], [(5, 5)]))
    try:
        _read(empty, height, width, may_be_empty=True)
        yield Finding("no positive click", True, "an empty answer, no error")
    except _Wrong as wrong:
        yield Finding("no positive click", False, str(wrong), "update the server")
    wrong_point = invoke(_body(image, [(9999, 5)]))
    told = wrong_point.status_code == 400 and "9999" in wrong_point.text
    in_status = "9999" in wrong_point.reason_phrase
    yield Finding(
        "errors", told, f"status {wrong_point.status_code}"
        + (", and the page shows why" if in_status else ", but the page shows the status alone (only the gateway can)"),
        "" if told else "update the server",
    )  # fmt: skip
    try:
        large = invoke(b'{"image": "' + b"A" * contract.MAX_BODY_BYTES + b'"}').status_code
    except httpx.TransportError:  # closed while we were still sending
        large = 413
    yield Finding(
        "limit", large == 413, f"more than {contract.MAX_BODY_BYTES // 2**20} MiB: status {large}",
        "" if large == 413 else "keep maxRequestBodySize in function.yaml",
    )  # fmt: skip


def _picture(height: int, width: int) -> bytes:
    """A PNG of a bright disc on noise; another one each time."""
    noise = np.random.default_rng(time.time_ns()).integers(0, 60, (height, width, 3), dtype=np.uint8)
    rows, columns = np.mgrid[:height, :width]
    noise[(rows - height / 2) ** 2 + (columns - width / 2) ** 2 < (height / 3) ** 2] += 150
    return rgb_to_png(noise)


def _body(image: bytes, positive: Any, negative: Any = ()) -> bytes:
    text = base64.b64encode(image).decode()
    return contract.dump({"image": text, "pos_points": positive, "neg_points": list(negative), "obj_bbox": []})


def _timed(call: Callable[[], httpx.Response]) -> tuple[httpx.Response, float]:
    began = time.perf_counter()
    return call(), time.perf_counter() - began


def _read(answer: httpx.Response, height: int, width: int, *, may_be_empty: bool = False) -> tuple[contract.Mask, str]:
    """The mask that the page would draw, and the form of the answer."""
    if answer.status_code != 200:
        raise _Wrong(f"status {answer.status_code}: {answer.reason_phrase} {answer.text[:200]}")
    try:
        fields = answer.json()
        form = "mask" if "mask" in fields else "shapes"
        if form == "mask":
            mask = np.array(fields["mask"]).astype(np.bool_)
        else:
            mask = np.zeros((height, width), np.bool_)
            for shape in fields["shapes"]:
                *runs, left, top, right, bottom = shape["points"]
                part = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(bottom - top + 1, right - left + 1)
                mask[top : bottom + 1, left : right + 1] |= part
    except (ValueError, KeyError, TypeError):
        raise _Wrong(f"the page cannot read the answer: {answer.text[:80]!r}") from None
    if mask.shape != (height, width):
        raise _Wrong(f"the mask has {mask.shape}, the image {(height, width)}")
    if not mask.any() and not may_be_empty:
        raise _Wrong("the mask is empty: the page says 'No shapes to display'")
    return mask, form


# -- CVAT -------------------------------------------------------------------------------------------------------------


def check_cvat(
    url: str, token: str | None, task: int | None, frame: int, *, form: str | None = None
) -> Iterator[Finding]:
    """A CVAT server: its version, whether it lists our function, and one click through it.

    form   of our server's answers, where that is known
    """
    try:
        version = about(url, token)
    except FetchError as problem:
        yield Finding("CVAT", False, str(problem), "CVAT_URL is the address that people type into their browser")
        return
    shown = ".".join(map(str, version))
    if version >= SHAPES_SINCE:
        advice = "; with CVAT_URL set for our server, auto answers in shapes" if form == "mask" else ""
        yield Finding("CVAT", True, f"version {shown} reads shapes and masks{advice}")
    else:
        yield Finding(
            "CVAT", form != "shapes", f"version {shown} is only sure to read masks",
            "set I2F_CVAT_RESPONSE=auto or mask for our server" if form == "shapes" else "",
        )  # fmt: skip
    if token is None:
        yield Finding("CVAT's functions", None, "not looked at: CVAT_ACCESS_TOKEN is not set")
        return
    with httpx.Client(base_url=url, timeout=150, headers={"Authorization": f"Bearer {token}"}) as client:
        listing = client.get("/api/lambda/functions")
        if listing.status_code in (401, 403):
            yield Finding(
                "CVAT's functions", False, f"status {listing.status_code}: the token is not accepted",
                "make a new one in CVAT's profile page",
            )  # fmt: skip
        elif listing.status_code == 404:
            yield Finding(
                "CVAT's functions", False, "CVAT runs without serverless functions",
                "set CVAT_SERVERLESS=1 for cvat_server and the workers, and restart them",
            )  # fmt: skip
        elif listing.status_code != 200:
            yield Finding(
                "CVAT's functions", False, f"status {listing.status_code}: {listing.text[:120]}",
                "set CVAT_NUCLIO_HOST (and CVAT_NUCLIO_PORT, 8070) to a name that cvat_server reaches; try from there: "
                "curl http://HOST:8070/api/functions",
            )  # fmt: skip
        elif not any(function.get("id") == NAME for function in listing.json()):
            yield Finding(
                "CVAT's functions", False, f"{len(listing.json())} functions, none of them {NAME}",
                "CVAT_NUCLIO_HOST names another dashboard: set it to the gateway, and give the other one as --upstream",
            )  # fmt: skip
        else:
            yield Finding("CVAT's functions", True, f"{NAME} among {len(listing.json())}")
            if task is not None:
                yield _check_task(client, task, frame)


def _check_task(client: httpx.Client, task: int, frame: int) -> Finding:
    name = f"click in task {task}"
    meta = client.get(f"/api/tasks/{task}/data/meta")
    if meta.status_code != 200:
        return Finding(name, False, f"status {meta.status_code}", "give the number of a task that this user may see")
    described = meta.json()
    if not 0 <= frame < described["size"]:
        return Finding(name, False, f"it has no frame {frame}", "give another --frame")
    known = described["frames"][frame if len(described["frames"]) > 1 else 0]  # a video has one entry for all frames
    width, height = known["width"], known["height"]
    answer, seconds = _timed(
        lambda: client.post(
            f"/api/lambda/functions/{NAME}",
            json={
                "task": task, "frame": frame, "pos_points": [[width / 2, height / 2]], "neg_points": [], "obj_bbox": [],
            },
        )
    )  # fmt: skip
    fixes = {
        503: "our server is not running, or it is busy",
        504: "raise the time-outs: eventTimeout in function.yaml, CVAT's own; or a smaller I2F_MODEL_SIZE",
        413: "the image is above 24 MiB: a region of interest, or a smaller image",
    }
    try:
        mask, form = _read(answer, height, width)
    except _Wrong as wrong:
        return Finding(name, False, str(wrong), fixes.get(answer.status_code, "look at the log of our server"))
    return Finding(name, True, f"{seconds:.2f} s, answer as {form}, {int(mask.sum())} of {width} x {height} pixels")


# -- command line -----------------------------------------------------------------------------------------------------


def findings(options: argparse.Namespace, settings: Settings) -> Iterator[Finding]:
    """Every line, in the order of looking."""
    form = None
    for finding in _to_the_end("server", check_server(options.server)):
        form = next((name for name in ("mask", "shapes") if f"answer as {name}" in finding.text), form)
        yield finding
    cvat = (options.cvat or settings.cvat_url or "").rstrip("/")
    if not cvat:
        yield Finding("CVAT", None, "not looked at: give --cvat or CVAT_URL")
        return
    token = settings.cvat_access_token
    secret = token.get_secret_value() if token else None
    yield from _to_the_end("CVAT", check_cvat(cvat, secret, options.task, options.frame, form=form))


def _to_the_end(name: str, looked: Iterator[Finding]) -> Iterator[Finding]:
    """The findings; an answer that never came, or is no HTTP or JSON, is one more."""
    try:
        yield from looked
    except (httpx.HTTPError, ValueError) as problem:
        yield Finding(name, False, f"no whole answer came ({type(problem).__name__})", "look at its log; is it busy?")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Look for what keeps CVAT and Inter2Former apart, and say what to do.")
    parser.add_argument("--server", default="http://127.0.0.1:8070", help="gateway, dashboard or function")
    parser.add_argument("--cvat", help="address of CVAT [CVAT_URL]; its access token is in CVAT_ACCESS_TOKEN")
    parser.add_argument("--task", type=int, help="make one click in this task, through CVAT")
    parser.add_argument("--frame", type=int, default=0, help="on this frame [0]")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    options = parser.parse_args(arguments)
    try:
        settings, found = load_settings(), []
        for finding in findings(options, settings):
            found.append(finding)
            if not options.json:
                print(finding, flush=True)
    except Inter2FormerError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([finding._asdict() for finding in found]))
    return 1 if any(finding.ok is False for finding in found) else 0


if __name__ == "__main__":
    sys.exit(main())
