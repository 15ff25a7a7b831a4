"""A CVAT server in miniature, for the real cvat-sdk and cvat-cli: tasks with images, labels and annotations, agents'
functions with their queue, and the serverless routes, which ask a dashboard as CVAT does. Answers have the keys that
the recorded ones have. Knows nothing of our code."""

import base64
import contextlib
import threading

import flask
import httpx
from werkzeug.serving import make_server

DATE = "2026-11-23T10:00:00.000000Z"
TASK = {
    "project_id": None, "owner": None, "assignee": None, "bug_tracker": "", "created_date": DATE, "updated_date": DATE,
    "overlap": 0, "segment_size": 1, "status": "annotation", "data_chunk_size": 1, "data": 1, "dimension": "2d",
    "data_compressed_chunk_type": "imageset", "data_original_chunk_type": "imageset", "image_quality": 70,
    "mode": "annotation", "subset": "", "organization": None, "organization_id": None, "project_name": None,
    "target_storage": None, "source_storage": None, "assignee_updated_date": None, "validation_mode": None,
    "jobs": {"count": 1, "completed": 0, "validation": 0, "url": "http://cvat.local"},
    "labels": {"url": "http://cvat.local"}, "initial_replicas": 0, "media_type": "image",
    "data_cloud_storage_id": None, "guide_id": None,
}  # fmt: skip
SHAPE = {
    "occluded": False, "outside": False, "z_order": 0, "rotation": 0.0, "group": 0, "source": "manual",
    "attributes": [], "elements": [],
}  # fmt: skip
FUNCTION = {
    "labels_v2": [], "description": "", "help_message": "", "animated_gif": "", "startswith_box": False,
    "startswith_box_optional": False, "min_pos_points": 1, "min_neg_points": -1,
    "owner": {"id": 1, "username": "u", "url": "http://cvat.local", "first_name": "", "last_name": ""},
}  # fmt: skip


@contextlib.contextmanager
def running(app):
    """A WSGI application on a port of this machine; gives its address."""
    http = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.port}"
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


class StandIn:
    """The server's state, to be set up and looked at by tests."""

    def __init__(self, *, version="2.80.0", token="secret", dashboard=None):
        self.version, self.token, self.dashboard = version, token, dashboard
        self.tasks = {}  # id: {"frames": [(name, bytes, width, height)], "labels": {id: name}, "shapes", "tracks"}
        self.projects = {}  # id: [task id]
        self.functions, self.queue, self.results = {}, [], {}
        self.requests = []  # (method, path with query)
        self.fail_after = None  # annotation writes that succeed before the server breaks
        self.app = self._app()

    def task(self, number, frames, labels, shapes=(), **more):
        self.tasks[number] = {
            "frames": list(frames), "labels": dict(labels), "tracks": [], "deleted": [], **more,
            "shapes": [{**SHAPE, "id": 100 + n, **shape} for n, shape in enumerate(shapes)],
        }  # fmt: skip

    def running(self):
        """The server on a port of this machine; gives its address."""
        return running(self.app)

    def count(self, method, part):
        return sum(seen == method and part in path for seen, path in self.requests)

    def _app(self):
        app = flask.Flask("cvat")
        app.url_map.strict_slashes = False
        lock = threading.Lock()

        @app.before_request
        def see():
            with lock:
                self.requests.append((flask.request.method, flask.request.full_path.rstrip("?")))
            if flask.request.path == "/api/server/about":
                return None
            if flask.request.headers.get("Authorization") != f"Bearer {self.token}":
                return {"detail": "Authentication credentials were not provided."}, 401
            return None

        @app.get("/api/server/about")
        def about():
            return {
                "name": "CVAT", "description": "d", "version": self.version, "logo_url": "http://cvat.local/l",
                "subtitle": "s",
            }  # fmt: skip

        def pages(rows):
            return {"count": len(rows), "next": None, "previous": None, "results": rows}

        def body(number):
            task = self.tasks[number]
            project = next((p for p, tasks in self.projects.items() if number in tasks), None)
            return {
                **TASK, "url": "http://cvat.local", "id": number, "name": f"t{number}", "size": len(task["frames"]),
                "project_id": project, "subset": task.get("subset", ""),
            }  # fmt: skip

        @app.get("/api/tasks")
        def tasks():
            project = flask.request.args.get("project_id", type=int)
            return pages([body(number) for number in self.projects.get(project, self.tasks)])

        @app.get("/api/tasks/<int:number>")
        def task(number):
            return body(number) if number in self.tasks else ({"detail": "Not found."}, 404)

        @app.get("/api/projects/<int:number>")
        def project(number):
            return {
                "url": "http://cvat.local", "id": number, "name": "p", "owner": None, "assignee": None,
                "guide_id": None, "bug_tracker": "", "task_subsets": [], "created_date": DATE, "updated_date": DATE,
                "status": "annotation", "dimension": "2d", "organization": None, "organization_id": None,
                "target_storage": None, "source_storage": None, "assignee_updated_date": None,
                "tasks": {"count": len(self.projects[number]), "url": "http://cvat.local"},
                "labels": {"url": "http://cvat.local"},
            }  # fmt: skip

        @app.get("/api/labels")
        def labels():
            found = self.tasks[flask.request.args.get("task_id", type=int)]["labels"]
            return pages(
                [
                    {
                        "id": n, "name": name, "color": "#ff0000", "attributes": [], "type": "any", "sublabels": [],
                        "has_parent": False, "parent_id": None,
                    }
                    for n, name in found.items()
                ]
            )  # fmt: skip

        @app.get("/api/tasks/<int:number>/data/meta")
        def meta(number):
            frames = [
                {"name": name, "width": w, "height": h, "related_files": 0, "has_related_context": False}
                for name, _, w, h in self.tasks[number]["frames"]
            ]
            size, video = len(frames), self.tasks[number].get("video")
            if video:  # has one entry, whatever its frames
                frames = [{**frames[0], "name": video}]
            return {
                "chunks_updated_date": DATE, "chunk_size": 1, "size": size, "image_quality": 70,
                "start_frame": 0, "stop_frame": size - 1, "frame_filter": "",
                "deleted_frames": self.tasks[number]["deleted"], "frames": frames, "included_frames": None,
                "storage": "local", "cloud_storage_id": None, "chapters": None,
            }  # fmt: skip

        @app.get("/api/tasks/<int:number>/data")
        def data(number):
            arguments = flask.request.args
            assert (arguments["type"], arguments["quality"]) == ("frame", "original")
            return flask.Response(
                self.tasks[number]["frames"][int(arguments["number"])][1], content_type="application/octet-stream"
            )

        @app.get("/api/tasks/<int:number>/annotations")
        def annotations(number):
            task = self.tasks[number]
            return {"version": 1, "tags": [], "shapes": task["shapes"], "tracks": task["tracks"], "intervals": []}

        @app.patch("/api/tasks/<int:number>/annotations")
        def change(number):
            if self.fail_after is not None:
                if self.fail_after == 0:
                    return {"detail": "broken"}, 500
                self.fail_after -= 1
            task, given = self.tasks[number], flask.request.get_json()["shapes"]
            with lock:
                if flask.request.args["action"] == "create":
                    start = max((shape["id"] for shape in task["shapes"]), default=99) + 1
                    made = [{**SHAPE, **shape, "id": start + n} for n, shape in enumerate(given)]
                    task["shapes"] = task["shapes"] + made
                else:
                    known = {shape["id"]: shape for shape in given}
                    kept = [shape for shape in task["shapes"] if shape["id"] not in known]
                    if flask.request.args["action"] == "update":
                        kept += [{**SHAPE, **shape} for shape in given]
                    task["shapes"], made = kept, given
            return {"version": 2, "shapes": made}

        # -- agents

        @app.post("/api/functions")
        def create_function():
            number = 12 + len(self.functions)
            self.functions[number] = {**FUNCTION, "id": number, **flask.request.get_json()}
            return self.functions[number], 201

        @app.get("/api/functions/<int:number>")
        def function(number):
            return self.functions[number]

        @app.post("/api/functions/queues/<queue>/requests/acquire")
        def acquire(queue):
            with lock:
                if flask.request.get_json()["request_category"] != "interactive" or not self.queue:
                    return {"ar_assignment": None}
                name, params = self.queue.pop(0)
            return {"ar_assignment": {"ar_id": name, "ar_params": {"type": "interact", **params}}}

        @app.post("/api/functions/queues/<queue>/requests/<name>/<how>")
        def finish(queue, name, how):
            self.results[name] = (how, flask.request.get_json())
            return {}

        # -- serverless: what CVAT's server asks its dashboard

        @app.get("/api/lambda/functions")
        def listed():
            if self.dashboard is None:
                return flask.Response("Cannot connect to the Nuclio dashboard", 503)
            return [as_page_sees(entry) for entry in httpx.get(self.dashboard + "/api/functions").json().values()]

        @app.post("/api/lambda/functions/<name>")
        def invoke(name):
            request = flask.request.get_json()
            _, image, _, _ = self.tasks[request["task"]]["frames"][request["frame"]]
            prompts = {key: request.get(key) for key in ("pos_points", "neg_points", "obj_bbox")}
            answer = httpx.post(
                self.dashboard + "/api/function_invocations",
                json={"image": base64.b64encode(image).decode(), **prompts},
                headers={"x-nuclio-function-name": name},
                timeout=60,
            )
            if answer.status_code >= 400:
                text = f"{answer.status_code} Client Error: {answer.reason_phrase} for url: {answer.url}"
                return flask.Response(text, answer.status_code)
            return answer.json()

        return app


def as_page_sees(entry):
    notes = entry["metadata"]["annotations"]
    return {
        "id": entry["metadata"]["name"], "kind": notes["type"], "name": notes["name"],
        "description": entry["spec"]["description"], "version": int(notes.get("version", 1)),
        "min_pos_points": int(notes.get("min_pos_points", 1)), "min_neg_points": int(notes.get("min_neg_points", -1)),
    }  # fmt: skip
