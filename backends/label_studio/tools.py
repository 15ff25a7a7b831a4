"""Commands for the administrator: doctor, connect, precompute. They talk to Label Studio and to the backend over HTTP,
as a person at a browser would, and run on any machine that reaches both.

Every finding that is not fine says what to do about it. Tokens and passwords are never printed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import ipaddress
import json
import math
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any
from urllib.parse import urlsplit
from xml.sax.saxutils import quoteattr

import httpx
import rich.console
import rich.progress
import typer

from backends.label_studio import contract
from backends.label_studio.credentials import REFRESH_PATH, is_personal_access_token
from inter2former import brush_rle

TITLE = "Inter2Former"
CONFIG_FAULT = "Labeling config:"
TIMEOUT_S = 130.0  # a click may wait for an encode; Label Studio itself gives up after 100 s
PAGE = 100  # tasks of one listing
_TOKEN_HELP = "personal access token (Account & Settings) or legacy token"

# What Label Studio or the backend says, and what to do about it. The guide has the same list for people.
FIXES = (
    (
        r"reserved network address",
        "Start Label Studio with ML_BLOCK_LOCAL_IP=false.",
    ),
    (
        r"HTTP 401|Unauthorized|personal access token|Legacy tokens",
        "Give the backend LABEL_STUDIO_API_KEY: a personal access token of a user who sees the project.",
    ),
    (
        r"address of Label Studio is not known",
        "Set LABEL_STUDIO_URL for the backend: Label Studio's address as the backend reaches it.",
    ),
    (
        r"private or reserved address",
        "List the host of the images in I2F_ALLOW_PRIVATE_HOSTS, or set LABEL_STUDIO_URL if it is Label Studio itself.",
    ),
    (r"does not resolve|could not be read|did not answer within", "The backend does not reach the host of the images."),
    (r"HTTP 404", "The image of this task is gone, or LABEL_STUDIO_URL points at another Label Studio."),
    (r"web page instead of an image", "The address of the images leads to a login page."),
    (r"over the limit", "The image is larger than I2F_MAX_PIXELS or I2F_MAX_DOWNLOAD_MB."),
    (r"not an image|truncated|empty", "The file behind this task is no image that can be read."),
    (r"refused|[Cc]onnection|[Tt]imed? ?out|Max retries", "Label Studio does not reach the backend at this address."),
    (r"valid ML backend|health", "The address is not the backend's, seen from Label Studio, or the password is wrong."),
)


class ToolError(Exception):
    """What could not be done, and what to do about it."""

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.fix = fix


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `good` is None when it is no fault, but worth knowing."""

    good: bool | None
    text: str
    fix: str = ""


def fix_for(text: str) -> str:
    """What to do about an error's text; empty when we do not know."""
    return next((fix for pattern, fix in FIXES if re.search(pattern, text)), "")


# -- the two servers -------------------------------------------------------------------------------------------------


class LabelStudio:
    """The platform's REST interface with a token of either kind. Close it."""

    def __init__(self, url: str, token: str, *, transport: httpx.BaseTransport | None = None) -> None:
        self.url = url.rstrip("/")
        self._token = token
        self._http = httpx.Client(base_url=self.url, timeout=TIMEOUT_S, transport=transport)
        self._authorized = False

    def close(self) -> None:
        self._http.close()

    def call(self, method: str, path: str, **arguments: Any) -> Any:
        """The JSON of an answer. ToolError with the platform's own words for anything that is not 2xx."""
        if not self._authorized:
            self._authorize()
        answer = self._send(method, path, **arguments)
        if answer.status_code == 401 and is_personal_access_token(self._token):  # access tokens live for minutes
            self._authorize()
            answer = self._send(method, path, **arguments)
        return _json_of(answer, f"Label Studio, {method} {path.partition('?')[0]}")

    def version(self) -> str:
        """Needs no token."""
        found = _json_of(self._send("GET", "/api/version"), "Label Studio")
        return str(found.get("release", "unknown")) if isinstance(found, dict) else "unknown"

    def _authorize(self) -> None:
        header = f"Token {self._token}"
        if is_personal_access_token(self._token):
            answer = self._send("POST", REFRESH_PATH, json={"refresh": self._token})
            if answer.status_code == 401:
                raise ToolError("Label Studio refuses the personal access token.", "Make a new one: it may be revoked.")
            header = f"Bearer {_json_of(answer, 'Label Studio')['access']}"
        self._http.headers["Authorization"] = header
        self._authorized = True

    def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **arguments)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ToolError(
                f"{self.url} does not answer ({type(error).__name__}).",
                "Check address and port; is it running?",
            ) from None


class BackendServer:
    """Our own server, seen from here."""

    def __init__(self, url: str, user: str = "", password: str = "", *, transport: Any = None) -> None:
        self.url = url.rstrip("/")
        auth = httpx.BasicAuth(user, password) if user else None
        self._http = httpx.Client(base_url=self.url, timeout=TIMEOUT_S, auth=auth, transport=transport)

    def close(self) -> None:
        self._http.close()

    def call(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **arguments)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ToolError(
                f"The backend at {self.url} does not answer ({type(error).__name__}).",
                "Start it (make serve); for other machines it listens only when started with --host 0.0.0.0.",
            ) from None
        if answer.status_code == 401:
            raise ToolError("The backend asks for a user name and password.", "Give --user and --password.")
        return answer


def _json_of(answer: httpx.Response, who: str) -> Any:
    if answer.is_success:
        try:
            return answer.json()
        except ValueError:
            raise ToolError(f"{who}: the answer is not JSON.", "Is this the address of Label Studio?") from None
    try:
        told = answer.json()
        detail = told.get("detail") or json.dumps(told.get("validation_errors") or told)
    except (ValueError, AttributeError):
        detail = answer.reason_phrase
    text = f"{who}: HTTP {answer.status_code} {str(detail)[:400]}"
    raise ToolError(text, fix_for(text))


# -- doctor ----------------------------------------------------------------------------------------------------------


def diagnose(platform: LabelStudio, backend: BackendServer, project: int | None) -> Iterator[Finding]:
    """All findings, in an order in which each makes sense only when those before are good."""
    try:
        yield Finding(True, f"Label Studio {platform.version()} answers at {platform.url}.")
        who = platform.call("GET", "/api/current-user/whoami")
        kind = "personal access token" if is_personal_access_token(platform._token) else "legacy token"
        yield Finding(True, f"The {kind} belongs to {who.get('email', 'a user')}.")
    except ToolError as error:
        yield Finding(False, str(error), error.fix)
        return
    try:
        health = backend.call("GET", "/health").json()
        yield Finding(True, f"The backend answers at {backend.url}: {health.get('model_version', 'unknown version')}.")
    except (ToolError, ValueError) as error:
        yield Finding(False, str(error), getattr(error, "fix", "This is not our backend."))
        return
    if _is_private(backend.url):
        yield Finding(
            None, f"{backend.url} is a private address.", "Label Studio needs ML_BLOCK_LOCAL_IP=false to call it."
        )
    if project is None:
        yield Finding(None, "No project was looked at.", "Give --project to check its config and make a real click.")
        return
    try:
        yield from _look_at_project(platform, backend, project)
    except ToolError as error:
        yield Finding(False, str(error), error.fix)


def _look_at_project(platform: LabelStudio, backend: BackendServer, number: int) -> Iterator[Finding]:
    project = platform.call("GET", f"/api/projects/{number}")
    text = str(project.get("label_config", ""))
    config = contract.parse_config(text)
    faults = [*config.warnings(), *_smart_faults(config, text)]
    for fault in faults:
        yield Finding(False, f"{CONFIG_FAULT} {fault}", "Use the config below, or `connect --set-config`.")
    if not faults:
        yield Finding(True, "The labeling config has smart points or boxes and a place for masks.")
    attached = platform.call("GET", f"/api/ml?project={number}")  # makes Label Studio call the backend
    ours = next((ml for ml in attached if str(ml.get("url", "")).rstrip("/") == backend.url), None)
    interactive = [ml for ml in attached if ml.get("is_interactive")]
    if ours is None:
        others = ", ".join(str(ml.get("url")) for ml in attached) or "none"
        yield Finding(False, f"The project has no backend at {backend.url} (it has: {others}).", "Run `connect`.")
        return
    if ours.get("state") in ("ER", "DI"):
        told = str(ours.get("error_message") or "Label Studio does not reach the backend.")
        yield Finding(False, f"Label Studio says: {told[:400]}", fix_for(told))
    else:
        yield Finding(True, "Label Studio reaches the backend.")
    if not ours.get("is_interactive"):
        yield Finding(False, "The backend is not interactive in this project.", "Run `connect`, which switches it on.")
        return
    if interactive[0]["id"] != ours["id"]:
        first = interactive[0].get("url")
        yield Finding(False, f"The page uses the first interactive backend, which is {first}.", "Remove that one.")
    yield _click(platform, number, ours["id"], config)


def _smart_faults(config: contract.LabelConfig, text: str) -> Iterator[str]:
    prompting = [control for control in config.controls if control.kind in ("keypointlabels", "keypoint")]
    if not prompting and not any(control.kind.startswith("rectangle") for control in config.controls):
        yield "There are no KeyPointLabels and no RectangleLabels to click with."
    for tag in re.findall(r"<Brush(?:Labels)?\b[^>]*>", text):
        if not re.search(r"""smart=["']false["']""", tag):
            yield 'The brush has no smart="false": the smart tool\'s key would choose it, and it sends nothing.'


def _click(platform: LabelStudio, project: int, ml: int, config: contract.LabelConfig) -> Finding:
    """One click in the middle of the first task's image, through Label Studio."""
    tasks = platform.call("GET", f"/api/tasks?project={project}&page_size=1")
    tasks = tasks["tasks"] if isinstance(tasks, dict) else tasks
    tag = next(iter((*config.images, *config.lists)), "")
    control = config.mask_control(tag)
    if not tasks or control is None:
        return Finding(None, "No click was made: the project has no task, or no place for masks.")
    point = {
        "id": "doctor0000",
        "from_name": "point",
        "to_name": tag,
        "type": "keypointlabels",
        "is_positive": True,
        "value": {"x": 50, "y": 50, "width": 0.3, "keypointlabels": list(control.labels[:1])},
        **({"item_index": 0} if tag in config.lists else {}),
    }
    asked = {"task": tasks[0]["id"], "context": {"result": [point]}}
    answer = platform.call("POST", f"/api/ml/{ml}/interactive-annotating", json=asked)
    errors = answer.get("errors")
    if errors:
        told = " ".join(str(error) for error in errors)
        return Finding(False, f"A click on task {tasks[0]['id']} failed: {told[:600]}", fix_for(told))
    regions = (answer.get("data") or {}).get("result") or []
    if not regions:
        return Finding(False, f"A click on task {tasks[0]['id']} gave no mask.", "Look at the backend's log.")
    region = regions[0]
    size = f"{region.get('original_width')} x {region.get('original_height')} pixels"
    area = ""
    with contextlib.suppress(Exception):
        mask = brush_rle.decode(region["value"]["rle"], region["original_height"], region["original_width"])
        area = f", {100 * mask.mean():.1f} % of it inside"
    return Finding(True, f"A click on task {tasks[0]['id']} gave a mask ({region.get('type')}, {size}{area}).")


def _is_private(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
        return any(not ipaddress.ip_address(address.partition("%")[0]).is_global for address in found)
    except (OSError, ValueError):
        return False


def recommended_config(text: str, labels: tuple[str, ...] = ()) -> str:
    """The guide's config with the labels, the image's name and its key of another config."""
    config = contract.parse_config(text)
    labels = labels or next((control.labels for control in config.controls if control.labels), ("Object",))
    paged = not config.images and bool(config.lists)
    tag, key = next(iter((*config.images.items(), *config.lists.items())), ("image", "$image"))

    def entries(more: str = "") -> str:
        return "".join(f"\n    <Label value={quoteattr(label)}{more}/>" for label in labels)

    image = quoteattr(tag)
    smart = 'smart="true" smartOnly="true"'
    inline = ' showInline="true"'
    return (
        f'<View>\n  <Image name={image} {"valueList" if paged else "value"}={quoteattr(key)} zoom="true"/>\n'
        f'  <KeyPointLabels name="point" toName={image} {smart}>{entries(inline)}\n  </KeyPointLabels>\n'
        f'  <RectangleLabels name="box" toName={image} {smart}>{entries(inline)}\n  </RectangleLabels>\n'
        f'  <BrushLabels name="brush" toName={image} smart="false">{entries()}\n  </BrushLabels>\n</View>\n'
    )


# -- connect ---------------------------------------------------------------------------------------------------------


def attach(platform: LabelStudio, url: str, project: int, user: str = "", password: str = "") -> str:
    """Makes the backend at `url` the project's, interactive; what was done. ToolError with Label Studio's words."""
    url = url.rstrip("/")
    auth = {"auth_method": "BASIC_AUTH", "basic_auth_user": user, "basic_auth_pass": password} if user else {}
    for ml in platform.call("GET", f"/api/ml?project={project}"):
        if str(ml.get("url", "")).rstrip("/") == url:
            body = {"project": project, "url": url, "title": ml.get("title") or TITLE, "is_interactive": True, **auth}
            platform.call("PATCH", f"/api/ml/{ml['id']}", json=body)
            return f"The backend was attached already (number {ml['id']}); it is interactive now."
    body = {"project": project, "url": url, "title": TITLE, "is_interactive": True, **auth}
    made = platform.call("POST", "/api/ml", json=body)
    return f"The backend is attached (number {made['id']}), model {made.get('model_version', 'unknown')}."


# -- precompute ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Precomputed:
    """What came of it. `full` says that the backend's folder, or without one its memory, ended it."""

    done: int = 0
    failed: int = 0
    full: bool = False
    total: int = 0


def precompute_project(
    platform: LabelStudio,
    backend: BackendServer,
    number: int,
    *,
    limit: int = 10**9,
    say: Callable[[Precomputed, str], None] = lambda *_: None,
) -> Precomputed:
    """Ask the backend to look at the images of a project's tasks, in their order, two at a time.

    Ends when the backend begins to forget older ones for them. Those that it knows already cost nothing, so the same
    command goes on where it was stopped.
    """
    project = platform.call("GET", f"/api/projects/{number}")
    created = str(project.get("created_at", ""))
    name = f"{number}.{_unix(created)}"
    total = min(int(project.get("task_number") or 0), limit)
    result = Precomputed(total=total)
    kept_on_disk = _metric(backend, "inter2former_folder_budget_bytes") > 0
    evictions = f"inter2former_{'folder' if kept_on_disk else 'cache'}_evictions_total"
    evicted = _metric(backend, evictions)

    def ask(task: dict[str, Any]) -> str:
        body = {
            "tasks": [{"id": task["id"], "data": task.get("data", {})}],
            "project": name,
            "label_config": project.get("label_config", ""),
            "params": {"context": {"event": "prewarm", "wait": True}},
        }
        left = 10**9
        while True:  # a task with many pages is answered in parts
            answer = backend.call("POST", "/predict", json=body)
            if not answer.is_success:
                break
            pending = 0
            with contextlib.suppress(ValueError, LookupError, TypeError):
                pending = len(answer.json()["results"][0]["result"][0]["value"]["pending"])
            if not 0 < pending < left:  # done, or no room for all of them
                return ""
            left = pending
        try:
            return str(answer.json().get("detail", answer.status_code))
        except ValueError:
            return f"HTTP {answer.status_code}"

    with ThreadPoolExecutor(2) as pool:
        for page in range(1, math.ceil(total / PAGE) + 1):
            listed = platform.call("GET", f"/api/tasks?project={number}&page={page}&page_size={PAGE}")
            tasks = (listed["tasks"] if isinstance(listed, dict) else listed)[: total - (page - 1) * PAGE]
            for start in range(0, len(tasks), 8):
                for trouble in pool.map(ask, tasks[start : start + 8]):
                    result.done += not trouble
                    result.failed += bool(trouble)
                    say(result, trouble)
                if _metric(backend, evictions) > evicted:
                    result.full = True
                    return result
    return result


def _unix(created: str) -> int:
    """Seconds of an ISO time, as Label Studio names projects; 0 when it is none."""
    try:
        return int(datetime.datetime.fromisoformat(created.replace("Z", "+00:00")).timestamp())
    except ValueError:
        return 0


def _metric(backend: BackendServer, name: str) -> float:
    text = backend.call("GET", "/metrics").text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.split("{")[0].split(" ")[0] == name)


# -- the command line ------------------------------------------------------------------------------------------------

Url = Annotated[str, typer.Option("--label-studio-url", envvar="LABEL_STUDIO_URL", help="address of Label Studio")]
Token = Annotated[str, typer.Option("--token", envvar="LABEL_STUDIO_API_KEY", help=_TOKEN_HELP, show_default=False)]
BackendUrl = Annotated[str, typer.Option("--backend", help="address of the backend, as Label Studio reaches it")]
User = Annotated[str, typer.Option("--user", envvar="I2F_BASIC_AUTH_USER", help="user name of the backend")]
Password = Annotated[
    str, typer.Option("--password", envvar="I2F_BASIC_AUTH_PASS", help="password of the backend", show_default=False)
]
_BACKEND = "http://127.0.0.1:9090"


@contextlib.contextmanager
def _servers(
    url: str, token: str, backend: str, user: str, password: str
) -> Iterator[tuple[LabelStudio, BackendServer]]:
    """Both servers; a ToolError becomes two lines on standard error and exit status 1."""
    console = rich.console.Console(stderr=True, highlight=False)
    platform, server = LabelStudio(url, token), BackendServer(backend, user, password)
    with contextlib.closing(platform), contextlib.closing(server):
        try:
            yield platform, server
        except ToolError as error:
            console.print(str(error), markup=False, soft_wrap=True)
            if error.fix:
                console.print(f"  -> {error.fix}", markup=False, soft_wrap=True)
            raise typer.Exit(1) from None


def doctor(
    url: Url,
    token: Token,
    backend: BackendUrl = _BACKEND,
    project: Annotated[int | None, typer.Option(help="number of a project to look at")] = None,
    user: User = "",
    password: Password = "",
) -> None:
    """Find out why a click gives no mask: both servers, tokens, the labeling config, and a real click."""
    console = rich.console.Console(highlight=False)
    bad, config_is_bad = 0, False
    with _servers(url, token, backend, user, password) as (platform, server):
        for finding in diagnose(platform, server, project):
            mark, style = {True: ("ok  ", "green"), False: ("BAD ", "bold red"), None: ("note", "yellow")}[finding.good]
            console.print(f"[{style}]{mark}[/] ", end="")
            console.print(finding.text, markup=False, soft_wrap=True)
            if finding.fix:
                console.print(f"     -> {finding.fix}", markup=False, soft_wrap=True)
            bad += finding.good is False
            config_is_bad = config_is_bad or finding.text.startswith(CONFIG_FAULT)
        if config_is_bad:
            config = str(platform.call("GET", f"/api/projects/{project}").get("label_config", ""))
            console.print("\n" + recommended_config(config), markup=False, soft_wrap=True)
    raise typer.Exit(1 if bad else 0)


def connect(
    url: Url,
    token: Token,
    project: Annotated[int, typer.Option(help="number of the project")],
    backend: BackendUrl = _BACKEND,
    user: User = "",
    password: Password = "",
    set_config: Annotated[bool, typer.Option(help="replace the labeling config by the recommended one")] = False,
    labels: Annotated[str, typer.Option(help="labels for --set-config, separated by commas")] = "",
) -> None:
    """Attach the backend to a project, interactive; with --set-config the recommended labeling config too."""
    console = rich.console.Console(highlight=False)
    with _servers(url, token, backend, user, password) as (platform, server):
        if set_config:
            old = str(platform.call("GET", f"/api/projects/{project}").get("label_config", ""))
            wanted = tuple(label.strip() for label in labels.split(",") if label.strip())
            platform.call("PATCH", f"/api/projects/{project}", json={"label_config": recommended_config(old, wanted)})
            console.print("The labeling config is the recommended one.")
        console.print(attach(platform, server.url, project, user, password), markup=False, soft_wrap=True)


def precompute(
    url: Url,
    token: Token,
    project: Annotated[int, typer.Option(help="number of the project")],
    backend: BackendUrl = _BACKEND,
    user: User = "",
    password: Password = "",
    limit: Annotated[int, typer.Option(min=1, help="at most so many tasks")] = 10**9,
) -> None:
    """Look at a project's images ahead of time, until the backend's folder (I2F_CACHE_DIR) or else memory is full."""
    console = rich.console.Console(stderr=True, highlight=False)
    with (
        _servers(url, token, backend, user, password) as (platform, server),
        rich.progress.Progress(console=console, transient=True) as bar,
    ):
        line = bar.add_task("images", total=None)

        def say(so_far: Precomputed, trouble: str) -> None:
            bar.update(line, total=so_far.total, completed=so_far.done + so_far.failed)
            if trouble:
                bar.console.print(trouble, markup=False, soft_wrap=True)

        result = precompute_project(platform, server, project, limit=limit, say=say)
    console.print(f"{result.done} of {result.total} images are known, {result.failed} failed.", soft_wrap=True)
    if result.full:
        console.print(
            "There is no room for more: raise I2F_CACHE_DIR_MB, or I2F_CACHE_MB if there is no I2F_CACHE_DIR."
        )
    raise typer.Exit(1 if result.failed else 0)
