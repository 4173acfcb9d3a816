"""A base and adapters over a real socket, asked as OpenAI's clients ask."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn

from offsite.client.listening import listening
from offsite.client.serving.app import Service
from offsite.client.serving.server import ends, service
from offsite.client.serving.speech import Speech
from offsite.emulator.methods import make
from offsite.emulator.modality.causal_text.encoding import opening
from offsite.emulator.modality.causal_text.shapes import TextExample
from offsite.emulator.plug import load
from offsite.emulator.serving.engine import Engine
from offsite.protos.errors import InputError

TOKEN = "secret"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serving")


@pytest.fixture
def kept(folder: Path, tiny: Any, chat: Any) -> Path:
    """A base, and an adapter of it, written once."""
    if not (folder / "base").exists():
        method, drawn = make("lora", {"rank": 2}), torch.Generator().manual_seed(0)
        adapter = method.start(tiny(), {0: 0}, seed=0)
        adapter = {key: one + 0.3 * torch.randn(one.shape, generator=drawn) for key, one in adapter.items()}
        method.export(folder / "adapters" / "ward" / "adapter", adapter, base=tiny(), base_name="base")
        tiny().save_pretrained(folder / "base")
        chat.save_pretrained(folder / "base")
    return folder


@pytest.fixture
def served(kept: Path) -> tuple[Engine, Service]:
    return service(kept / "base", kept / "adapters", name="base", precision="fp32", waiting=4, most=40)


Ask = Callable[..., tuple[int, Any]]


@contextmanager
def asking(served: tuple[Engine, Service]) -> Iterator[Ask]:
    """Serve in threads; what asks returns a status, and a document or the data of a stream."""
    engine, answers = served
    config = uvicorn.Config(answers.app(TOKEN), log_config=None, access_log=False, lifespan="off")
    server = uvicorn.Server(config)

    def ask(path: str, body: Any = None, *, token: str = TOKEN) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        text = body if isinstance(body, str | None) else json.dumps(body)
        connection.request("POST" if text else "GET", path, text, {"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        said = answer.read().decode()
        connection.close()
        if answer.headers["content-type"].startswith("text/event-stream"):
            return answer.status, [line[6:] for line in said.splitlines() if line.startswith("data: ")]
        return answer.status, json.loads(said)

    with listening(0) as bound:
        port = bound.getsockname()[1]
        threads = [threading.Thread(target=engine.run), threading.Thread(target=server.run, args=([bound],))]
        for thread in threads:
            thread.start()
        try:
            yield ask
        finally:
            server.should_exit = True
            engine.close()
            for thread in threads:
                thread.join()


def greedy(model: Any, ids: Any, most: int) -> list[int]:
    ids, given = list(ids), len(ids)
    with torch.no_grad():
        for _ in range(most):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[given:]


def test_the_base_and_an_adapter_answer_at_once_whole_and_as_a_stream(
    served: tuple[Engine, Service], kept: Path, tiny: Any, chat: Any
) -> None:
    turns = [{"role": "user", "content": "w5 w6"}]
    prompt = opening(TextExample("", "", (*turns, {"role": "assistant", "content": "."})), chat)
    own = load(tiny(), kept / "adapters" / "ward" / "adapter")
    tokens = {"base": greedy(tiny(), prompt, 7), "ward": greedy(own, prompt, 7)}
    said = {name: chat.decode(answer, skip_special_tokens=True) for name, answer in tokens.items()}
    assert said["base"] != said["ward"]

    with asking(served) as ask, ThreadPoolExecutor(4) as pool:
        status, models = ask("/v1/models")
        assert status == 200 and [one["id"] for one in models["data"]] == ["base", "ward"]
        assert models["data"][1]["parent"] == "base"
        body = {"messages": turns, "max_completion_tokens": 7, "temperature": 0}
        asked = [pool.submit(ask, "/v1/chat/completions", body | {"model": name}) for name in said]
        more = {"stream": True, "stream_options": {"include_usage": True}}
        streams = [pool.submit(ask, "/v1/chat/completions", body | {"model": name} | more) for name in said]
        for name, one in zip(said, asked, strict=True):
            status, answer = one.result()
            assert (status, answer["object"], answer["model"]) == (200, "chat.completion", name)
            (choice,) = answer["choices"]
            assert choice["message"] == {"role": "assistant", "content": said[name]}
            assert choice["finish_reason"] == "length"
            given = len(prompt)
            assert answer["usage"] == {"prompt_tokens": given, "completion_tokens": 7, "total_tokens": given + 7}
        for name, one in zip(said, streams, strict=True):
            status, (*parts, end) = one.result()
            *chunks, usage = map(json.loads, parts)
            assert end == "[DONE]" and usage["usage"]["completion_tokens"] == 7 and not usage["choices"]
            assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and len(chunks) > 3
            assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == said[name]
            assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "length"]

        ids = chat("w7 w8").input_ids
        body = {"model": "ward", "prompt": ids, "temperature": 1, "seed": 3}
        status, answer = ask("/v1/completions", body)
        words = answer["choices"][0]["text"].split()
        assert answer["object"] == "text_completion" and answer["usage"]["completion_tokens"] == 16
        last = next(word for at, word in enumerate(words) if at and word not in words[:at])
        status, answer = ask("/v1/completions", body | {"prompt": "w7 w8", "stop": last})
        assert answer["choices"][0]["text"].split() == words[: words.index(last)]
        assert answer["choices"][0]["finish_reason"] == "stop"


BAD = [
    ("{", 400, "the request: Invalid JSON"),
    ({"prompt": "w5"}, 400, "model: Field required"),
    ({"model": "wards", "prompt": "w5"}, 404, "there is no model 'wards'; did you mean ward?"),
    ({"model": "../base", "prompt": "w5"}, 404, "there is no model"),
    ({"model": "ward", "prompt": "w5", "max_tokens": 41}, 400, "41 is more than 40, which --max-tokens allows"),
    ({"model": "ward", "prompt": "w5 " * 60}, 400, "goes beyond the 64 that the model has places for"),
    ({"model": "ward", "prompt": [5, 96]}, 400, "a token must be from 0 to 95"),
    ({"model": "ward", "prompt": "w5", "logit_bias": {}}, 400, "logit_bias: is not known here"),
    ({"model": "ward", "prompt": "w5", "n": 2}, 400, "n: Input should be 1"),
    ({"model": "ward", "prompt": "w5", "temperature": 3}, 400, "temperature: Input should be less than or equal to 2"),
    (" " * (5 << 20), 400, "the request has more than 4,194,304 bytes"),
]


def test_what_is_wrong_is_said_as_openais_clients_read_it(served: tuple[Engine, Service]) -> None:
    with asking(served) as ask:
        for body, status, message in BAD:
            got, answer = ask("/v1/completions", body)
            assert got == status and message in answer["error"]["message"], (answer, message)
        turn = {"role": "wizard", "content": "w5"}
        status, answer = ask("/v1/chat/completions", {"model": "ward", "messages": [turn]})
        assert status == 400 and "role must be one of system" in answer["error"]["message"]
        status, answer = ask("/v1/models", token="other")
        assert status == 401 and "Authorization: Bearer" in answer["error"]["message"]


def test_more_than_may_wait_is_refused_for_now_and_who_has_gone_is_not_answered(
    served: tuple[Engine, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = served
    step, go = engine.step, threading.Event()

    def held() -> bool:
        go.wait()
        return step()

    monkeypatch.setattr(engine, "step", held)
    body = {"model": "ward", "prompt": "w5", "max_tokens": 30, "stream": True}
    with asking(served) as ask, ThreadPoolExecutor(4) as pool:
        first = [pool.submit(ask, "/v1/completions", body) for _ in range(4)]
        while len(engine._waiting) < 4:
            time.sleep(0.01)
        status, answer = ask("/v1/completions", body)
        assert status == 429 and answer["error"] == {
            "message": "4 requests are waiting", "type": "rate_limit_error", "param": None, "code": None
        }  # fmt: skip
        monkeypatch.setattr(engine._model, "forward", lambda **_: 1 / 0)
        go.set()
        for one in first:
            status, (error, done) = one.result()
            assert status == 200 and "division by zero" in json.loads(error)["error"]["message"] and done == "[DONE]"


class Letters:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return bytes(tokens).decode(errors="replace")


def test_a_text_comes_in_whole_characters_and_ends_before_a_stop() -> None:
    speech = Speech(Letters(), b"so: ", [])
    assert [speech.take(byte) for byte in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    speech = Speech(Letters(), b"so: ", ["END", "\n"])
    assert [speech.take(byte) for byte in b"an EVEN EN"] == ["a", "n", " ", "", "EV", "", "", "EN ", "", ""]
    assert speech.take(ord("D")) == "" and speech.over
    speech = Speech(Letters(), b"", ["END"])
    assert [speech.take(byte) for byte in b"xEN"] + [speech.take(None)] == ["x", "", "", "EN"]


def test_an_answer_ends_at_all_tokens_that_model_and_tokenizer_end_at(tiny: Any, chat: Any) -> None:
    model = tiny()
    model.generation_config.eos_token_id = [2, 7]
    assert ends(model, chat) == {2, 7}
    model.generation_config.eos_token_id = None
    assert ends(model, chat) == {2}


def test_a_run_is_fetched_into_the_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from offsite.client import session
    from offsite.client.commands.serve import _fetch

    fetched = list[str]()

    class Coordinator:
        def __enter__(self) -> "Coordinator":
            return self

        def __exit__(self, *_: object) -> None: ...

        def run(self, id: str) -> Any:
            self.id = id
            return self

        def result(self, folder: Path) -> Path:
            fetched.append(self.id)
            (folder / "adapter").mkdir(parents=True)
            return folder

    monkeypatch.setattr(session, "connect", lambda *_, **__: Coordinator())
    for _ in range(2):
        _fetch(["r1", "r2"], tmp_path / "adapters", "localhost:1", tmp_path)
    assert fetched == ["r1", "r2"] and (tmp_path / "adapters" / "r2" / "adapter").is_dir()
    with pytest.raises(InputError, match="--run needs a folder for what it fetches"):
        _fetch(["r1"], None, "localhost:1", tmp_path)
