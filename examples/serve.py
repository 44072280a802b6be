"""A small server: one compiled model, a queue, and several prompts at once, each in its own `drad.generation()`.

    python examples/serve.py                                # http://127.0.0.1:8000, the small model of tiny_video
    curl localhost:8000/generate -d '{"prompt": "A red circle slides left on a gray background.", "steps": 10}'
    curl localhost:8000/jobs/1                              # state, step, place in the queue
    curl -o clip.webp localhost:8000/jobs/1/video
    curl -o report.html localhost:8000/report               # what was replaced, and the sparsity that was executed

Requests are worked on in turn, a denoising step of each, by one thread. Ctrl-C stops after the present step.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

import dynamicrad_compile as drad
from dynamicrad_compile.beforehand import usable_device
from dynamicrad_compile.errors import DynamicRadError
from dynamicrad_compile.optional import optional
from dynamicrad_compile.quality.tiny_video import model as tiny_video

log = logging.getLogger("serve")

SMALL = tiny_video.CHECKPOINT
CHECKPOINTS = {"32": SMALL, "64": SMALL.with_name("checkpoint64")}  # pixels of a side: 1,024 and 4,096 tokens
OPTIONS = {"min_tokens": 0, "mode": "dynamic_threshold", "dense_steps": 2}  # short clips: by itself all stays dense
MAX_STEPS, MAX_BYTES = 100, 65_536
KEPT = 100  # finished jobs that are remembered


@dataclass
class Job:
    """A request: "queued", "running", "done" with `video` (WebP) or "failed" with `error`."""

    number: int
    prompt: str
    steps: int
    seed: int
    state: str = "queued"
    step: int = 0
    error: str = ""
    video: bytes = field(default=b"", repr=False)
    generation: Any = field(default_factory=drad.generation, repr=False)
    videos: Iterator[torch.Tensor] | None = field(default=None, repr=False)


class Full(Exception):
    """The queue holds as many requests as it may."""


class Worker(threading.Thread):
    """The thread that calls the model: a step of each running job in turn, `together` of them at most.

    denoise  (prompt, steps, seed) -> the clip [1, 3, frames, height, width] in -1..1 after each step
    waiting  jobs that may wait; `submit` raises Full for one more
    """

    def __init__(self, denoise: Callable[[str, int, int], Iterator[torch.Tensor]], together: int, waiting: int) -> None:
        super().__init__(name="worker")
        self.denoise, self.together, self.most_waiting = denoise, together, waiting
        self.jobs: dict[int, Job] = {}
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.changed = threading.Condition()  # guards everything above
        self.calling = threading.Lock()  # held while the model runs
        self.stopping = False

    def submit(self, prompt: str, steps: int, seed: int) -> Job:
        """Put a request into the queue. Raises Full."""
        with self.changed:
            if len(self.waiting) >= self.most_waiting or self.stopping:
                raise Full
            job = Job(max(self.jobs, default=0) + 1, prompt, steps, seed)
            finished = [number for number, old in self.jobs.items() if old.state in ("done", "failed")]
            for number in finished[: max(0, len(finished) - KEPT + 1)]:
                del self.jobs[number]
            self.jobs[job.number] = job
            self.waiting.append(job)
            self.changed.notify()
            return job

    def status(self, number: int) -> dict[str, Any] | None:
        """What /jobs/ID answers; None if there is no such job."""
        with self.changed:
            job = self.jobs.get(number)
            if job is None:
                return None
            known = {"id": job.number, "state": job.state, "step": job.step, "steps": job.steps}
            if job.state == "queued":
                known["position"] = self.waiting.index(job)  # 0: the next one
            if job.state == "failed":
                known["error"] = job.error
            if job.state == "done":
                known["video"] = f"/jobs/{job.number}/video"
            return known

    def stop(self) -> None:
        """End after the present step; what is not done has failed."""
        with self.changed:
            self.stopping = True
            self.changed.notify()

    def run(self) -> None:
        """Work until `stop`."""
        while True:
            with self.changed:
                while not (self.waiting or self.running or self.stopping):
                    self.changed.wait()
                if self.stopping:
                    for job in [*self.running, *self.waiting]:
                        job.state, job.error = "failed", "the server was stopped"
                    return
                while self.waiting and len(self.running) < self.together:
                    job = self.waiting.popleft()
                    job.state = "running"
                    self.running.append(job)
                running = list(self.running)
            for job in running:
                if not self.stopping:
                    self._advance(job)

    def _advance(self, job: Job) -> None:
        """One step of a job, in its own generation; whatever goes wrong in it is the end of this job alone."""
        state, error, video = "running", "", b""
        try:
            if job.videos is None:
                job.videos = self.denoise(job.prompt, job.steps, job.seed)
            with self.calling, job.generation:
                clip = next(job.videos)
            if job.step + 1 == job.steps:
                state, video = "done", webp(clip[0])
        except Exception as problem:
            log.exception("job %d failed", job.number)
            state, error = "failed", f"{type(problem).__name__}: {problem}"
        with self.changed:
            job.state, job.error, job.video = state, error, video
            job.step += state != "failed"
            if state != "running":
                job.videos = job.generation = None
                self.running.remove(job)


def webp(clip: torch.Tensor) -> bytes:
    """A clip [3, frames, height, width] in -1..1 as an animated WebP."""
    from tiny_video import pictures

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "clip.webp")
        pictures.animation([[clip]], file)
        return file.read_bytes()


class Server(ThreadingHTTPServer):
    """Answers over HTTP; `problem_of(prompt)` says what is wrong with a prompt, or nothing."""

    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        worker: Worker,
        report: Callable[[], drad.Report],
        problem_of: Callable[[str], str],
    ) -> None:
        super().__init__(address, Handler)
        self.worker, self.report, self.problem_of = worker, report, problem_of


class Handler(BaseHTTPRequestHandler):
    """POST /generate, GET /jobs/ID, GET /jobs/ID/video, GET /report. Answers are JSON, but for video and report."""

    server: Server
    timeout = 30  # seconds to wait for a client that says nothing

    def do_POST(self) -> None:
        """Take a request into the queue."""
        if self.path != "/generate":
            return self.refuse(HTTPStatus.NOT_FOUND, "POST goes to /generate")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BYTES:
            return self.refuse(HTTPStatus.BAD_REQUEST, f"the body must have a Content-Length of at most {MAX_BYTES}")
        try:
            asked = checked(json.loads(self.rfile.read(int(length))), self.server.problem_of)
        except (ValueError, RecursionError) as problem:
            return self.refuse(HTTPStatus.BAD_REQUEST, str(problem))
        try:
            job = self.server.worker.submit(**asked)
        except Full:
            waiting = self.server.worker.most_waiting
            message = f"the queue is full: {waiting} requests wait; try again when one of them is done"
            return self.refuse(HTTPStatus.SERVICE_UNAVAILABLE, message, {"Retry-After": "5"})
        return self.answer(HTTPStatus.ACCEPTED, self.server.worker.status(job.number))

    def do_GET(self) -> None:
        """Status or video of a job, or the report."""
        worker = self.server.worker
        if self.path == "/report":
            with tempfile.TemporaryDirectory() as folder, worker.calling:  # the numbers of whole steps
                page = Path(folder, "report.html")
                self.server.report().to_html(page)
                content = page.read_bytes()
            return self.send(HTTPStatus.OK, content, "text/html; charset=utf-8")
        match = re.fullmatch(r"/jobs/(\d{1,9})(/video)?", self.path)
        if not match:
            return self.refuse(HTTPStatus.NOT_FOUND, "known are POST /generate, GET /jobs/ID, /jobs/ID/video, /report")
        status = worker.status(int(match[1]))
        if status is None:
            return self.refuse(HTTPStatus.NOT_FOUND, f"there is no job {match[1]}, or no longer")
        if not match[2]:
            return self.answer(HTTPStatus.OK, status)
        if status["state"] != "done":
            return self.refuse(HTTPStatus.CONFLICT, f"job {match[1]} is {status['state']}: there is no video of it")
        return self.send(HTTPStatus.OK, worker.jobs[int(match[1])].video, "image/webp")

    def refuse(self, status: HTTPStatus, message: str, headers: dict[str, str] | None = None) -> None:
        """Say what is wrong."""
        self.answer(status, {"error": message}, headers)

    def answer(self, status: HTTPStatus, values: Any, headers: dict[str, str] | None = None) -> None:
        """Send JSON."""
        self.send(status, json.dumps(values).encode() + b"\n", "application/json", headers)

    def send(self, status: HTTPStatus, content: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        """Send an answer."""
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """To Python's logging."""
        log.info(format, *args)


def checked(asked: Any, problem_of: Callable[[str], str]) -> dict[str, Any]:
    """prompt, steps and seed of a request's JSON. Raises ValueError that says what is wrong."""
    if not isinstance(asked, dict) or not isinstance(asked.get("prompt"), str):
        raise ValueError('expected a JSON object such as {"prompt": "A red circle ...", "steps": 10, "seed": 0}')
    if unknown := sorted(set(asked) - {"prompt", "steps", "seed"}):
        raise ValueError(f"unknown: {', '.join(unknown)}; known are prompt, steps and seed")
    if problem := problem_of(asked["prompt"]):
        raise ValueError(problem)
    found = {"prompt": asked["prompt"]}
    for name, default, most in (("steps", tiny_video.STEPS, MAX_STEPS), ("seed", 0, 2**31 - 1)):
        value = found[name] = asked.get(name, default)
        least = 1 if name == "steps" else 0
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value!r}")
    return found


def problem_of(text: tiny_video.TextEncoder, prompt: str) -> str:
    """What the small model can't do with a prompt; '' if it can."""
    words = text.words(prompt)
    if unknown := sorted(set(words) - set(text.ids)):
        return f"the model does not know {', '.join(unknown)}; its words are {', '.join(text.ids)}"
    if not 1 <= len(words) <= tiny_video.TEXT_TOKENS:
        return f"a prompt has 1 to {tiny_video.TEXT_TOKENS} words, got {len(words)}"
    return ""


def build(args: argparse.Namespace) -> Server:
    """The compiled model, its worker (not started) and the server, which listens already."""
    transformer, text = tiny_video.load(CHECKPOINTS[args.size], args.device)
    side = int(args.size)
    options = {**OPTIONS, "sparsity": args.sparsity, "block_size": 16 if side == 32 else 64, "inner": args.inner}
    compiled = drad.compile(transformer, **options)

    def denoise(prompt: str, steps: int, seed: int) -> Iterator[torch.Tensor]:
        return tiny_video.denoise(compiled, text, [prompt], seed, steps=steps, size=(side, side))

    worker = Worker(denoise, args.together, args.queue)
    return Server(
        (args.host, args.port), worker, lambda: drad.report(compiled), lambda prompt: problem_of(text, prompt)
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments, checked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=CHECKPOINTS, default="32", help="pixels of the model's clips (32)")
    parser.add_argument("--sparsity", type=float, default=0.6, help="share of dense attention to skip (0.6)")
    parser.add_argument("--together", type=int, default=4, help="requests that run in turn (4)")
    parser.add_argument("--queue", type=int, default=16, help="requests that may wait (16); one more is refused, 503")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (8000)")
    parser.add_argument("--inner", default="inductor", help="what compiles the rest of the model (inductor)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        drad.Options(sparsity=args.sparsity, inner=args.inner)
        usable_device(args.device)
        for name, task, extra in (("PIL", "videos need", "plot"), ("diffusers", "the model needs", "diffusers")):
            optional(name, task, extra)
    except DynamicRadError as error:
        parser.error(str(error))
    for name in ("together", "queue"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    args = parse(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        server = build(args)
    except OSError as error:
        raise SystemExit(f"error: {args.host}:{args.port}: {error.strerror or error}") from None
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C is ignored in what a shell runs in the background
        signal.signal(number, signal.default_int_handler)
    server.worker.start()
    print(
        f"listening at http://{args.host}:{server.server_address[1]}; the first request compiles the model", flush=True
    )
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopping after the present step ...", flush=True)
    finally:
        server.server_close()
        server.worker.stop()
        server.worker.join()
    print("stopped", flush=True)


if __name__ == "__main__":
    main()
