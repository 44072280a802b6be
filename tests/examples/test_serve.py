"""The server: requests at once give the clips that they give alone, and what goes wrong is said and stays there."""

from __future__ import annotations

import http.client
import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http import HTTPStatus

import pytest
import serve
import torch
from support.one_layer import save_checkpoint

PROMPTS = [
    "A red circle bounces quickly on a gray background.",
    "A striped yellow square stands still on a blue background.",
    "A green triangle slides right on a black background.",
]
ARGUMENTS = ["--device", "cpu", "--port", "0", "--inner", "aot_eager"]


@contextmanager
def serving(server):
    """The server and its worker run; both end behind it."""
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,)), server.worker]
    for thread in threads:
        thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        server.worker.stop()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()


def ask(server, path, body=None, headers=None):
    """(status, JSON or bytes) of a request."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
    content = body if body is None or isinstance(body, (str, bytes)) else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, content, headers or {})
    answer = connection.getresponse()
    found = answer.read()
    connection.close()
    return answer.status, json.loads(found) if "json" in answer.headers["Content-Type"] else found


def finished(server, number):
    """Status of a job that has ended."""
    for _ in range(6000):
        _, status = ask(server, f"/jobs/{number}")
        if status["state"] in ("done", "failed"):
            return status
        time.sleep(0.01)
    raise AssertionError(status)


class Model:
    """Stands in for denoising: waits for `go` at each step, and notes whose step it was."""

    def __init__(self):
        self.go, self.steps = threading.Semaphore(0), []

    def __call__(self, prompt, steps, seed):
        for _ in range(steps):
            assert self.go.acquire(timeout=30)
            self.steps.append(seed)
            if prompt == "fails":
                raise ZeroDivisionError("this one fails")
            yield torch.full((1, 3, 2, 8, 8), seed / 10)


def stand_in(together=2, waiting=2):
    model = Model()
    worker = serve.Worker(model, together, waiting)
    return model, serve.Server(("127.0.0.1", 0), worker, lambda: serve.drad.Report(), lambda prompt: "")


def test_clips_of_requests_at_once_are_those_of_each_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(serve.CHECKPOINTS, "32", save_checkpoint(tmp_path))
    server = serve.build(serve.parse(ARGUMENTS))
    bodies = [{"prompt": prompt, "steps": 3 + i, "seed": i} for i, prompt in enumerate(PROMPTS)]
    alone, at_once = [], []
    with serving(server):
        for body in bodies:
            status, job = ask(server, "/generate", body)
            assert status == HTTPStatus.ACCEPTED
            assert finished(server, job["id"])["state"] == "done"
            alone.append(ask(server, f"/jobs/{job['id']}/video")[1])
        with server.worker.calling:  # no step is taken before all three are there
            jobs = [ask(server, "/generate", body)[1]["id"] for body in bodies]
        for job in jobs:
            assert finished(server, job) == {
                "id": job, "state": "done", "step": job - 1, "steps": job - 1, "video": f"/jobs/{job}/video",
            }  # fmt: skip
            at_once.append(ask(server, f"/jobs/{job}/video")[1])
        page = ask(server, "/report")[1].decode()
    assert at_once == alone
    assert len(set(alone)) == 3
    assert "1 of 1 video self-attentions replaced" in page
    from PIL import Image

    with Image.open(io.BytesIO(alone[0])) as video:
        assert video.n_frames == 16


def test_requests_run_in_turn_and_the_queue_is_bounded():
    model, server = stand_in()
    with serving(server):
        for seed in range(2):
            assert ask(server, "/generate", {"prompt": "a", "steps": 3, "seed": seed})[0] == HTTPStatus.ACCEPTED
        model.go.release()
        while ask(server, "/jobs/2")[1]["state"] != "running":
            time.sleep(0.01)
        for seed in (2, 3):
            status, job = ask(server, "/generate", {"prompt": "a", "steps": 1, "seed": seed})
            assert (status, job["state"], job["position"]) == (HTTPStatus.ACCEPTED, "queued", seed - 2)
        status, answer = ask(server, "/generate", {"prompt": "a"})
        assert status == HTTPStatus.SERVICE_UNAVAILABLE
        assert answer == {"error": "the queue is full: 2 requests wait; try again when one of them is done"}
        assert ask(server, "/jobs/4/video")[0] == HTTPStatus.CONFLICT
        for _ in range(7):
            model.go.release()
        assert [finished(server, number)["state"] for number in (1, 2, 3, 4)] == ["done"] * 4
        assert ask(server, "/generate", {"prompt": "a", "steps": 1})[0] == HTTPStatus.ACCEPTED
        model.go.release()
        finished(server, 5)
    assert model.steps == [0, 0, 1, 0, 1, 1, 2, 3, 0]


def test_a_request_that_fails_fails_alone():
    model, server = stand_in()
    with serving(server):
        ask(server, "/generate", {"prompt": "fails", "steps": 1})
        ask(server, "/generate", {"prompt": "a", "steps": 1})
        model.go.release()
        model.go.release()
        assert finished(server, 1)["error"] == "ZeroDivisionError: this one fails"
        assert finished(server, 2)["state"] == "done"
        assert ask(server, "/jobs/1/video")[0] == HTTPStatus.CONFLICT


def test_what_is_not_done_when_the_server_stops_has_failed():
    model, server = stand_in(together=1)
    with serving(server):
        ask(server, "/generate", {"prompt": "a", "steps": 2})
        ask(server, "/generate", {"prompt": "a", "steps": 2})
        server.worker.stop()
        model.go.release()
        server.worker.join(30)
        assert [ask(server, f"/jobs/{number}")[1]["error"] for number in (1, 2)] == ["the server was stopped"] * 2
        assert ask(server, "/generate", {"prompt": "a"})[0] == HTTPStatus.SERVICE_UNAVAILABLE
    assert len(model.steps) <= 1


def test_finished_jobs_are_forgotten_at_last(monkeypatch):
    monkeypatch.setattr(serve, "KEPT", 2)
    model, server = stand_in()
    with serving(server):
        for number in range(1, 5):
            assert ask(server, "/generate", {"prompt": "a", "steps": 1})[1]["id"] == number
            model.go.release()
            finished(server, number)
        assert [ask(server, f"/jobs/{number}")[0] for number in range(1, 5)] == [404, 404, 200, 200]


def test_bad_input_is_told(tmp_path):
    text = serve.tiny_video.create({"num_layers": 1})[1]
    worker = serve.Worker(Model(), 1, 1)
    server = serve.Server(("127.0.0.1", 0), worker, lambda: None, lambda prompt: serve.problem_of(text, prompt))
    long = " ".join(["a"] * 21)
    with serving(server):
        for body, message in [
            ("", "Expecting value"),
            (b"\xff", "can't decode byte"),
            ("[" * 60_000, "recursion"),
            ([], "expected a JSON object such as"),
            ({"steps": 1}, "expected a JSON object such as"),
            ({"prompt": PROMPTS[0], "size": 3}, "unknown: size; known are prompt, steps and seed"),
            ({"prompt": "A cat surfs."}, "the model does not know cat, surfs; its words are a, an, "),
            ({"prompt": " "}, "a prompt has 1 to 20 words, got 0"),
            ({"prompt": long}, "a prompt has 1 to 20 words, got 21"),
            ({"prompt": "a", "steps": 101}, "steps must be a whole number from 1 to 100, got 101"),
            ({"prompt": "a", "steps": True}, "steps must be a whole number from 1 to 100, got True"),
            ({"prompt": "a", "seed": -1}, "seed must be a whole number from 0 to 2147483647, got -1"),
            ("a" * (serve.MAX_BYTES + 1), "Content-Length of at most 65536"),
        ]:
            status, answer = ask(server, "/generate", body)
            assert status == HTTPStatus.BAD_REQUEST
            assert message in answer["error"]
        assert ask(server, "/elsewhere", {})[0] == HTTPStatus.NOT_FOUND
        assert ask(server, "/jobs/1")[1] == {"error": "there is no job 1, or no longer"}
        assert ask(server, "/")[0] == HTTPStatus.NOT_FOUND
    assert not worker.jobs


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--together", "0"], "--together must be at least 1"),
        (["--sparsity", "2"], "sparsity = 2.0"),
        (["--inner", "inducter"], "inner = 'inducter'"),
        (["--device", "cudaa"], "device 'cudaa' can't be used here"),
    ],
)
def test_refuses(argv, message, capsys):
    with pytest.raises(SystemExit):
        serve.parse(argv)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_ends_it(tmp_path):
    process = subprocess.Popen(
        [sys.executable, serve.__file__, *ARGUMENTS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    line = process.stdout.readline()
    port = int(re.search(r"127.0.0.1:(\d+);", line)[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/generate", json.dumps({"prompt": PROMPTS[0], "steps": 100}))
    assert connection.getresponse().status == HTTPStatus.ACCEPTED
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.endswith("stopped\n")
    assert "Traceback" not in err
