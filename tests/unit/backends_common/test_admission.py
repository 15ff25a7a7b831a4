"""R10, R11: who may compute, in which order, and what the others are told."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from backends.common.http import BusyError
from backends.common.server import Admission, Ticket


def test_the_urgent_go_first_and_equals_by_arrival() -> None:
    admission = Admission(running=1, waiting=9, wait_s=30.0)
    tickets = {name: Ticket(urgency) for name, urgency in (("ahead", 2), ("first", 0), ("second", 0), ("late", 0))}
    order: list[str] = []

    def work(name: str) -> None:
        with admission.turn(tickets[name]):
            order.append(name)

    with ThreadPoolExecutor(4) as pool, admission.turn():
        for count, name in enumerate(tickets, 1):
            pool.submit(work, name)
            while admission.waiting < count:
                time.sleep(0.001)
        tickets["first"].urgency = 1  # while it waits
    assert order == ["second", "late", "first", "ahead"]
    assert admission.waiting == 0


def test_who_gives_up_leaves_the_line() -> None:
    admission = Admission(running=1, waiting=1, wait_s=0.01)
    with admission.turn():
        with pytest.raises(BusyError), admission.turn():
            raise AssertionError
        assert admission.waiting == 0
    with admission.turn():
        pass


def test_never_more_at_once_than_allowed() -> None:
    admission = Admission(running=2, waiting=50, wait_s=30.0)
    lock, now, most = threading.Lock(), 0, 0

    def work(_: int) -> None:
        nonlocal now, most
        with admission.place(), admission.turn():
            with lock:
                now += 1
                most = max(most, now)
            time.sleep(0.001)
            with lock:
                now -= 1

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(work, range(40)))
    assert (now, most) == (0, 2)


def test_a_ticket_waits_in_one_line_after_the_other() -> None:
    lines = [Admission(running=1, waiting=9, wait_s=30.0) for _ in range(2)]
    ticket, through = Ticket(), threading.Event()

    def work() -> None:
        for line in lines:
            with line.turn(ticket):
                pass
        through.set()

    with ThreadPoolExecutor(1) as pool, lines[1].turn():
        with lines[0].turn():
            pool.submit(work)
            while not lines[0].waiting:
                time.sleep(0.001)
        while not lines[1].waiting:
            time.sleep(0.001)
        assert not through.wait(0.05)
    assert through.is_set()
    for line in lines:
        assert line.waiting == 0
        with line.turn():
            pass
