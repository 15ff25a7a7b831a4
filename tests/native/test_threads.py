"""The native thread pool: many callers, changing sizes, forks, and the interpreter's lock (R2, R22, R34, R36)."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from inter2former import _native
from inter2former.runtime import native
from tests.native.support import make, tokens, weights


def test_r2_concurrent_callers_each_get_their_own_answer() -> None:
    packed = _native.HybridExperts(weights(make(64, 32, 6)))
    cases = [tuple(t.numpy() for t in tokens(300 + 50 * seed, 64, seed)) for seed in range(8)]
    want = [packed.forward(x, edge) for x, edge in cases]
    _native.set_threads(3)

    def ask(seed: int) -> bool:
        return all(np.array_equal(packed.forward(*cases[seed]), want[seed]) for _ in range(30))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))


def test_r2_callers_that_share_the_threads_get_the_same_answers() -> None:
    packed = _native.HybridExperts(weights(make(64, 32, 6)))
    x, edge = (t.numpy() for t in tokens(700, 64))
    want = packed.forward(x, edge)
    for threads in (1, 2, 3):
        _native.set_threads(threads)
        for callers in (1, 2, 5):
            with native.among(callers):
                assert np.array_equal(packed.forward(x, edge), want)
        assert np.array_equal(packed.forward(x, edge), want)


def test_r34_the_number_of_threads_may_change_under_load() -> None:
    packed = _native.HybridExperts(weights(make(64, 32, 6)))
    x, edge = (t.numpy() for t in tokens(700, 64))
    want = packed.forward(x, edge)
    finished = threading.Event()

    def resize() -> None:
        count = 1
        while not finished.is_set():
            count = count % 4 + 1
            _native.set_threads(count)
            time.sleep(0.001)

    changer = threading.Thread(target=resize)
    changer.start()
    try:
        same = [np.array_equal(packed.forward(x, edge), want) for _ in range(60)]
    finally:
        finished.set()
        changer.join()
    assert all(same)


def test_r36_python_goes_on_during_native_work() -> None:
    packed = _native.HybridExperts(weights(make(128, 64, 4)), "scalar")  # slow on purpose
    x, edge = (t.numpy() for t in tokens(3000, 128))
    started, ended = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        packed.forward(x, edge)
        ended.set()

    worker = threading.Thread(target=work)
    worker.start()
    started.wait()
    beats = 0
    while not ended.is_set():
        time.sleep(0.001)
        beats += 1
    worker.join()
    assert beats >= 5  # with the lock held there would be one or two


FORK = """
import os, signal, sys
from tests.native.with_module import load

load(sys.argv[1])
import numpy as np
from inter2former import _native
from tests.native.support import make, tokens, weights

packed = _native.HybridExperts(weights(make(64, 32, 6)))
x, edge = (t.numpy() for t in tokens(700, 64))
_native.set_threads(3)
want = packed.forward(x, edge)  # the parent's pool runs before the fork
for _ in range(10):
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        same = all(np.array_equal(packed.forward(x, edge), want) for _ in range(3))
        os._exit(0 if same else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
assert np.array_equal(packed.forward(x, edge), want)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_r22_a_forked_child_has_its_own_pool() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(_native.__file__)], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
