"""Label Studio's labeling page in Chromium with our backend behind it: what a person does, and what is stored.

Pictures of the page are left in out/e2e, those of the guide in out/e2e/guide as they are in docs/images. Skipped where
there is no Chromium.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from label_studio_real import PASSWORD, ROOT, USER, Client, Photo, Project, backend, checked_mask
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; make e2e installs it")

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
PATIENCE_MS = 180_000
PICTURES = ROOT / "out" / "e2e"

_SMART_TOOL = """name => {
    const tool = ToolManager.getInstance({name: "image"}).findSelectedTool();
    return !!tool && tool.dynamic && tool.toolName === name; }"""
# What the tool's button calls.
_CHOOSE_SMART_TOOL = """name => {
    const tools = ToolManager.getInstance({name: "image"}).allTools();
    const tool = tools.find(tool => tool.dynamic && tool.toolName === name);
    if (tool) tool.manager.selectTool(tool, true);
    return !!tool; }"""

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: install one (apt-get install chromium), or name it in CHROMIUM"
)


class LabelingPage:
    """A task, open in the browser, as the annotator sees it."""

    def __init__(self, page: Any, project: Project) -> None:
        self._page, self._project = page, project
        self._masks = 0

    def open(self, task: int) -> None:
        self._page.goto(f"{self._project.client.address}/projects/{self._project.id}/data?task={task}")
        self._loaded()

    def reload(self) -> None:
        self._page.reload()
        self._loaded()

    def _loaded(self) -> None:
        self._page.wait_for_selector(".konvajs-content canvas")
        self._page.wait_for_function("() => window.Htx && !Htx.isLoading && Htx.annotationStore.selected")
        self._page.wait_for_function(
            """() => [...Htx.annotationStore.selected.names.values()]
                     .some(tag => tag.type === "image" && tag.imageIsLoaded !== false && tag.stageRef)"""
        )
        # The switch itself is drawn over: the box is pressed from a script.
        switch = self._page.get_by_test_id("bottombar-auto-annotation-toggle")
        switch.wait_for(state="attached")
        if not switch.is_checked():
            switch.evaluate("box => box.click()")

    def click(self, x: float, y: float, *, positive: bool = True, key: str = "1") -> dict[str, Any]:
        """A smart click at percent (x, y), label chosen by its key; the platform's answer to it."""
        self._choose_points(key)

        def act() -> None:
            if not positive:
                self._page.keyboard.down("Alt")
            self._page.mouse.click(*self._place(x, y))
            if not positive:
                self._page.keyboard.up("Alt")

        return self._answer_to(act)

    def box(self, x0: float, y0: float, x1: float, y1: float) -> dict[str, Any]:
        """A smart rectangle between two corners in percent; the platform's answer to it."""
        # The points' labels have the first two keys. The smart tools of boxes are one button with two tools in it,
        # which is there only while one of their labels is chosen.
        self._page.keyboard.press("3")
        self._page.wait_for_timeout(300)
        chosen = self._page.evaluate(_CHOOSE_SMART_TOOL, "RectangleTool")
        assert chosen, "the page has no smart rectangle"
        self._page.wait_for_timeout(300)

        def act() -> None:
            self._page.mouse.move(*self._place(x0, y0))
            self._page.mouse.down()
            self._page.mouse.move(*self._place((x0 + x1) / 2, (y0 + y1) / 2), steps=4)
            self._page.mouse.move(*self._place(x1, y1), steps=4)
            self._page.mouse.up()

        return self._answer_to(act)

    def _choose_points(self, key: str) -> None:
        """The label after the tool: the other way round the page takes the plain tool.

        M goes on to the next smart tool, and a reloaded page remembers the last one. After a click the label is let go.
        """
        for _ in range(4):
            if self._page.evaluate(_SMART_TOOL, "KeyPointTool"):
                break
            self._page.keyboard.press("m")
            self._page.wait_for_timeout(300)
        self._page.keyboard.press(key)
        self._page.wait_for_timeout(300)

    def _place(self, x: float, y: float) -> tuple[float, float]:
        """Percent of the image as a point of the window."""
        left, top = self._page.evaluate(
            """([x, y]) => {
                 const image = Htx.annotationStore.selected.names.get("image"), stage = image.stageRef;
                 const place = stage.container().getBoundingClientRect();
                 const point = stage.getAbsoluteTransform().point(
                   {x: image.internalToCanvasX(x), y: image.internalToCanvasY(y)});
                 return [place.left + point.x, place.top + point.y]; }""",
            [x, y],
        )
        return left, top

    def _answer_to(self, act: Callable[[], None]) -> dict[str, Any]:
        with self._page.expect_response("**/interactive-annotating*", timeout=PATIENCE_MS) as waiting:
            act()
        answer = waiting.value
        asked = answer.request.post_data_json["context"]["result"]
        self._page.wait_for_function("() => !Htx.awaitingSuggestions && Htx.annotationStore.selected.suggestions.size")
        return {"context": asked, "answer": answer.json()}

    def regions(self) -> int:
        """How many the annotator sees, without suggestions."""
        return int(self._page.evaluate("() => Htx.annotationStore.selected.regionStore.regions.length"))

    def masks(self) -> int:
        """How many of them are painted."""
        return int(
            self._page.evaluate(
                """() => Htx.annotationStore.selected.regionStore.regions
                         .filter(region => region.type === "brushregion").length"""
            )
        )

    def accept(self) -> None:
        self._page.get_by_test_id("bottombar-accept-suggestions-button").first.click()
        self._page.wait_for_function("() => !Htx.annotationStore.selected.suggestions.size")

    def submit(self) -> None:
        with self._page.expect_response(
            lambda answer: "/annotations" in answer.url and answer.request.method == "POST", timeout=PATIENCE_MS
        ):
            self._page.locator("button[name=submit]").first.click()

    def wait_for_draft(self, kind: str, count: int) -> None:
        """Until the page has saved so many clicks ("keypointlabels" with a place) or masks ("brushlabels")."""
        end = time.monotonic() + PATIENCE_MS / 1000
        part = "rle" if kind == "brushlabels" else "x"
        while True:
            drafts = self._project.client.drafts(self._project.tasks[0])
            saved = [entry for draft in drafts for entry in draft["result"] if entry["type"] == kind]
            if sum(part in entry["value"] for entry in saved) == count:
                return
            assert time.monotonic() < end, saved
            time.sleep(0.5)

    def picture(self, name: str, guide: str = "") -> None:
        """Of the whole page; and of the image with its bars and lists for the guide, if it is named."""
        (PICTURES / "guide").mkdir(parents=True, exist_ok=True)
        self._page.screenshot(path=PICTURES / f"{name}.png")
        if guide:
            with Image.open(PICTURES / f"{name}.png") as shown:
                part = shown.convert("RGB").crop((240, 90, 1400, 900)).resize((812, 567), Image.Resampling.LANCZOS)
            part.save(PICTURES / "guide" / f"label_studio_{guide}.jpg", quality=85)


@contextmanager
def opened(project: Project) -> Iterator[LabelingPage]:
    """A browser of its own, logged in, with the project's first task open."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(PATIENCE_MS)
        page.goto(f"{project.client.address}/user/login/")
        page.fill("input[name=email]", USER)
        page.fill("input[name=password]", PASSWORD)
        page.click("button[type=submit]")
        page.wait_for_url(lambda address: "/login" not in address)
        labeling = LabelingPage(page, project)
        try:
            labeling.open(project.tasks[0])
            yield labeling
        except BaseException:
            labeling.picture("failed")
            raise
        finally:
            browser.close()


def test_click_correct_accept_submit(client: Client, server: str, photo: Callable[[str], Photo]) -> None:
    project = client.project([photo("coffee.jpg")], server)
    with opened(project) as page:
        first = page.click(48, 45, key="2")
        page.picture("1-first-click", "click")
        second = page.click(20, 15, positive=False, key="2")
        page.picture("2-negative-click", "alt")
        page.accept()
        page.picture("3-accepted", "accepted")
        page.submit()
        page.picture("4-submitted")
    assert [entry["is_positive"] for entry in first["context"]] == [True]
    assert [entry["is_positive"] for entry in second["context"]] == [True, False]
    checked_mask(first["answer"]["data"]["result"], first["context"])
    served = checked_mask(second["answer"]["data"]["result"], second["context"])

    (annotation,) = project.annotations(project.tasks[0])
    # The page stores an accepted mask under the clicking control as well, with the same id.
    masks = [entry for entry in annotation["result"] if entry["type"] == "brushlabels"]
    assert len({entry["id"] for entry in annotation["result"]}) == 1
    assert np.array_equal(checked_mask(masks, second["context"]), served)


def test_signs_survive_a_reload(client: Client, server: str, photo: Callable[[str], Photo]) -> None:
    project = client.project([photo("chelsea.jpg")], server)
    with opened(project) as page:
        page.click(45, 45)
        before = page.click(8, 12, positive=False)
        page.wait_for_draft("keypointlabels", 2)
        page.reload()
        after = page.click(60, 50)
        page.picture("5-after-a-reload")
    signs = {entry["id"]: entry["is_positive"] for entry in before["context"]}
    assert [entry.get("is_positive") for entry in after["context"]] == [None, None, True]
    remembered = [entry | {"is_positive": signs.get(entry["id"], True)} for entry in after["context"]]
    checked_mask(after["answer"]["data"]["result"], remembered)


def test_box_second_object_and_a_reload_in_mid_object(
    client: Client, server: str, photo: Callable[[str], Photo]
) -> None:
    project = client.project([photo("coffee.jpg")], server)
    with opened(project) as page:
        boxed = page.box(20, 8, 82, 92)
        page.picture("6-box")
        page.accept()
        second = page.click(8, 60)  # a second object, after the first was accepted: the table
        page.wait_for_draft("keypointlabels", 1)
        page.reload()
        again = page.click(90, 90, positive=False)
        page.picture("7-second-object")
        page.accept()
        assert page.masks() == 2
        # The page takes away the clicks that it knows as such. One made before the reload stays, as a plain point.
        assert page.regions() == 3
        page.wait_for_draft("brushlabels", 2)
        # On a mask a click would choose that mask.
        taken = np.any([checked_mask(seen["answer"]["data"]["result"], seen["context"]) for seen in (boxed, again)], 0)
        free = np.pad(~taken, 1).astype(np.uint8)  # a click on the very border is none to the page
        away = cv2.distanceTransform(free, cv2.DIST_L2, 5)[1:-1, 1:-1]
        row, column = np.unravel_index(int(away.argmax()), away.shape)
        third = page.click(100 * (column + 0.5) / taken.shape[1], 100 * (row + 0.5) / taken.shape[0])
        page.accept()
        page.submit()
    assert [entry["type"] for entry in boxed["context"]] == ["rectanglelabels"]
    assert len(second["context"]) == 1
    assert len(again["context"]) == 2
    # That point comes along with the next object, but has no part in it.
    assert len(third["context"]) == 2
    assert len(third["answer"]["data"]["result"][0]["meta"]["inter2former"]["clicks"]) == 1
    (annotation,) = project.annotations(project.tasks[0])
    stored = [entry for entry in annotation["result"] if entry["type"] == "brushlabels"]
    served = [seen["answer"]["data"]["result"][0] for seen in (boxed, again, third)]
    assert [entry["value"]["rle"] for entry in stored] == [entry["value"]["rle"] for entry in served]
    # Where a mask comes from is kept with it.
    assert [entry["meta"]["inter2former"]["model"] for entry in stored] == [project.model_version] * 3
    for entry in (*project.client.export(project.id)[0]["annotations"][0]["result"],):
        if entry["type"] == "brushlabels":
            assert entry["meta"]["inter2former"]["score"] >= 0


def test_a_turned_photo_in_the_page(client: Client, server: str) -> None:
    turned = Photo(ROOT / "tests/fixtures/label_studio/images/chelsea_exif6.jpg", (300, 451))
    project = client.project([turned], server)
    with opened(project) as page:
        found = page.click(45, 45)
        page.picture("8-turned-photo")
        page.accept()
        page.submit()
    served = checked_mask(found["answer"]["data"]["result"], found["context"])
    assert served.shape == (451, 300)
    (annotation,) = project.annotations(project.tasks[0])
    masks = [entry for entry in annotation["result"] if entry["type"] == "brushlabels"]
    assert np.array_equal(checked_mask(masks, found["context"]), served)


def test_a_click_near_an_accepted_mask_corrects_it(
    client: Client, photo: Callable[[str], Photo], logs: Path, weights: dict[str, str]
) -> None:
    with backend(logs / "correcting.txt", **weights, I2F_CORRECT_WITHIN="6") as correcting:
        project = client.project([photo("coffee.jpg")], correcting)
        with opened(project) as page:
            first = page.click(48, 45, key="2")
            mask = checked_mask(first["answer"]["data"]["result"], first["context"])
            page.accept()
            page.picture("9-accepted-before")
            page.wait_for_draft("brushlabels", 1)
            height, width = mask.shape
            away = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 5)
            middle = np.zeros_like(mask)
            middle[height // 10 : -height // 10, width // 10 : -width // 10] = True
            rows, columns = np.nonzero((away > 4) & (away < 0.05 * max(height, width)) & middle)
            row, column = rows[len(rows) // 2], columns[len(rows) // 2]
            second = page.click(100 * (column + 0.5) / width, 100 * (row + 0.5) / height, key="2")
            page.picture("10-corrected", "corrected")
            page.accept()
            assert page.regions() == 1
            page.submit()
        (region,) = second["answer"]["data"]["result"]
        assert region["id"] == first["answer"]["data"]["result"][0]["id"]
        corrected = checked_mask([region], second["context"])
        (annotation,) = project.annotations(project.tasks[0])
        masks = [entry for entry in annotation["result"] if entry["type"] == "brushlabels"]
        assert np.array_equal(checked_mask(masks, second["context"]), corrected)
