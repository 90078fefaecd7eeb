"""A minute of clients that come, ask, and go away whenever they like: no row is lost, and no memory."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from pathlib import Path

import psutil
from exported import language_model, save_step
from serving import Server, serving

SECONDS = 60.0
CLIENTS = 24


def one_client(server: Server, seed: int, until: float, done: list[int]) -> None:
    """Completions of random kinds; half of them are left at a random moment, the others read to their end."""
    choose = random.Random(seed)
    while time.monotonic() < until:
        body = {
            "prompt": "".join(choose.choices("abcdefgh \u00e9", k=choose.choice([0, 3, 50, 700]))),
            "max_tokens": choose.choice([0, 1, 20, 400, 3000]),
            "n": choose.choice([1, 1, 1, 4]),
            "stream": choose.random() < 0.5,
            "echo": choose.random() < 0.3,
            "return_state": choose.random() < 0.2,
        }
        if choose.random() < 0.3:
            body["logprobs"] = choose.choice([0, 3])
        connection = server.open(body)
        try:
            if choose.random() < 0.5:
                connection.settimeout(choose.choice([0.001, 0.01, 0.1]))
                connection.recv(choose.choice([1, 100, 5000]))
            else:
                connection.settimeout(60)
                while chunk := connection.recv(65536):
                    if chunk.endswith((b"0\r\n\r\n", b"}")):
                        break
                done.append(1)
        except TimeoutError:
            pass
        finally:
            if choose.random() < 0.3:  # without a word of goodbye: a reset, not an end
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.close()


def test_nothing_leaks(tmp_path: Path) -> None:
    model = save_step(language_model(), tmp_path / "m.onnx")
    with serving(model, "--rows", "16", "--cache-mb", "4", "--states", "100", "--max-waiting", "60") as server:
        process = psutil.Process(server.process.pid)
        memory: list[int] = []
        done: list[int] = []
        for part in range(4):
            until = time.monotonic() + SECONDS / 4
            threads = [
                threading.Thread(target=one_client, args=(server, 1000 * part + k, until, done)) for k in range(CLIENTS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            server.wait_until_idle(60)
            memory.append(process.memory_info().rss)
        assert len(done) > 100
        assert memory[3] - memory[1] < 8 << 20, memory  # the first quarters fill caches
        assert process.num_threads() < 40
        assert len(process.net_connections()) < 10
        text = "".join(chr(97 + k % 26) for k in range(50))
        status, answer = server.post("/v1/completions", {"prompt": text, "max_tokens": 5, "seed": 1})
        assert status == 200, answer
        assert json.dumps(answer)
        assert server.metric("gfrnn_rows") == server.metric("gfrnn_waiting") == 0
