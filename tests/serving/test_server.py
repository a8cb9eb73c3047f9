"""The HTTP server, over real sockets: answers, adapters, bounds, attacks, and its end."""

from __future__ import annotations

import io
import json
import re
import shlex
import socket
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers.models import TRAINING_TEXT
from peft import PeftModel
from safetensors.torch import load

pytest.importorskip("fastapi")
import httpx2
from helpers.serving import Running, running

from lora_factory import CVAELoRAGenerator
from lora_factory.cli.commands import main, parse
from lora_factory.errors import LoraFactoryError
from lora_factory.models.decoding import Prompt, chat_tokens, decode
from lora_factory.models.inputs import text_tokens
from lora_factory.models.loading import load_base_model
from lora_factory.serving import engine
from lora_factory.serving.launch import check_address

TEXTS = ("Permission is hereby granted", "def add(left, right)", "The old man reads a letter")
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def server(generator_folder: Path) -> Iterator[Running]:
    with running(generator_folder, adapters=4, batch_size=8) as started:
        yield started


@pytest.fixture(scope="module")
def expected(generator_folder: Path, base_folder: Path) -> dict[tuple[str | None, str], str]:
    """The answers of models with one adapter, or none, to prompts one at a time."""
    generator, found = CVAELoRAGenerator.from_pretrained(generator_folder), {}
    for text in (None, *TEXTS, "1 + 2 = 3", "Poems about the sea", "Letters"):
        model: Any
        model, tokenizer = load_base_model(base_folder)
        if text is not None:
            model = generator.generate_adapter(text, model)
        for prompt in ("Hello", "The quick brown", "x" * 40):
            (answer,) = decode(model, tokenizer, [Prompt(text_tokens(tokenizer, prompt, begins=True), 12)])
            found[text, prompt] = answer.text
            (answer,) = decode(
                model, tokenizer, [Prompt(chat_tokens(tokenizer, [{"role": "user", "content": prompt}]), 12)]
            )
            found[text, "chat " + prompt] = answer.text
    return found


def complete(server: Running, **body: Any) -> httpx2.Response:
    return server.client.post("/v1/completions", json={"model": "pico-chat", "prompt": "Hello", **GREEDY, **body})


def error_of(response: httpx2.Response) -> str:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


def test_the_openai_client_gets_the_adapters_answers(
    server: Running, expected: dict[tuple[str | None, str], str]
) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    answers = {}
    for text in (None, *TEXTS):
        name = "pico-chat" if text is None else f"factory:{text}"
        chat = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": "Hello"}], temperature=0, max_tokens=12
        )
        answers[text] = chat.choices[0].message.content
        assert answers[text] == expected[text, "chat Hello"]
        assert chat.usage.completion_tokens <= 12 and chat.choices[0].finish_reason in ("stop", "length")
        text_answer = client.completions.create(model=name, prompt="Hello", temperature=0, max_tokens=12)
        assert text_answer.choices[0].text == expected[text, "Hello"]
        stream = client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
            temperature=0,
            max_completion_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answers[text]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason == chat.choices[0].finish_reason
        assert chunks[-1].usage == chat.usage
    assert len(set(answers.values())) == 4
    assert {"pico-chat", "factory:poems"} <= {model.id for model in client.models.list()}
    with pytest.raises(openai.NotFoundError, match="make it anew with POST /adapters"):
        client.completions.create(model="adapter-0", prompt="Hello")
    with pytest.raises(openai.BadRequestError, match="logit_bias: is not supported"):
        client.completions.create(model="pico-chat", prompt="Hello", logit_bias={"5": 1})


def test_many_clients_get_their_own_answers(server: Running, expected: dict[tuple[str | None, str], str]) -> None:
    before = server.metrics()
    for prompt in ("Hello", "The quick brown"):
        assert len({answer for (_, asked), answer in expected.items() if asked == prompt}) == 7
    # Requests that follow each other have different adapters, more than there is room for.
    wanted = sorted((key for key in expected if not key[1].startswith("chat ")), key=lambda key: key[1])
    jobs = [wanted[number % len(wanted)] for number in range(320)]

    def ask(job: tuple[str | None, str]) -> str:
        text, prompt = job
        response = complete(server, model="pico-chat" if text is None else f"factory:{text}", prompt=prompt)
        return str(response.json()["choices"][0]["text"])

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(ask, jobs))
    assert answers == [expected[job] for job in jobs]
    after = server.metrics()
    route = 'lora_factory_requests_total{route="/v1/completions",status="200"}'
    assert after[route] - before.get(route, 0) == 320
    batches = after["lora_factory_batches_total"] - before["lora_factory_batches_total"]
    assert batches < 320 / 2  # requests of different adapters were answered together
    assert after["lora_factory_adapters"] == 4 and after["lora_factory_adapters_evicted_total"] > 0
    assert after["lora_factory_queue_length"] == 0


def test_sampling_repeats_with_a_seed(server: Running) -> None:
    hot = {"temperature": 1.0, "max_tokens": 20, "top_p": 0.9}
    first, again, other = (complete(server, **hot, seed=seed).json()["choices"] for seed in (1, 1, 2))
    assert first == again != other
    whole = complete(server, max_tokens=12).json()["choices"][0]["text"]
    stopped = complete(server, stop=[whole[5:7], "never there"]).json()["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == (whole[: whole.index(whole[5:7])], "stop")


def test_a_stream_is_server_sent_events(server: Running) -> None:
    whole = complete(server).json()["choices"][0]["text"]
    lines = complete(server, stream=True).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_an_adapter_comes_as_facts_archive_and_weights(
    server: Running, generator_folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    body = {"text": TEXTS[0], "rank": 1, "seed": 3, "temperature": 1.0}
    facts = server.client.post("/adapters", json=body).json()
    saved = CVAELoRAGenerator.from_pretrained(generator_folder).save_adapter(
        TEXTS[0], tmp_path / "saved", rank=1, seed=3, temperature=1.0
    )
    generation = json.loads((saved / "generation.json").read_text())
    assert facts["distance"] == generation["distance"] and facts["sha256"] == generation["sha256"]
    assert [one["task"] for one in facts["nearest_tasks"]] == [one["task"] for one in generation["nearest_tasks"]]
    archive = server.client.post("/adapters", json=body, headers={"Accept": "application/zip"})
    assert archive.headers["X-Adapter-Id"] == facts["id"]
    with zipfile.ZipFile(io.BytesIO(archive.content)) as file:
        file.extractall(tmp_path)
    weights = server.client.post("/adapters", json=body, headers={"Accept": "application/octet-stream"}).content
    assert weights == (saved / "adapter_model.safetensors").read_bytes()
    assert all(1 in tensor.shape for tensor in load(weights).values())
    model, tokenizer = load_base_model(base_folder)
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")
    (alone,) = decode(adapted, tokenizer, [Prompt(text_tokens(tokenizer, "Hello", begins=True), 12)])
    assert complete(server, model=facts["id"]).json()["choices"][0]["text"] == alone.text
    refused = server.client.post("/adapters", json=body, headers={"Accept": "image/png"})
    assert (refused.status_code, "choose one of" in error_of(refused)) == (406, True)


def test_an_adapter_from_examples_is_that_of_the_generator(
    server: Running, generator_folder: Path, tmp_path: Path
) -> None:
    examples: list[Any] = [*TRAINING_TEXT, {"prompt": "Line 1: ", "completion": "fox"}]
    made = server.client.post("/adapters", json={"text": TEXTS[1], "examples": examples})
    assert made.status_code == 200 and made.json()["refined_on"] == 0
    saved = CVAELoRAGenerator.from_pretrained(generator_folder).save_adapter(
        TEXTS[1], tmp_path / "saved", examples=examples
    )
    assert made.json()["sha256"] == json.loads((saved / "generation.json").read_text())["sha256"]


ATTACKS: dict[str, tuple[dict[str, Any], int]] = {
    "no prompt": ({"prompt": None}, 400),
    "a number for text": ({"prompt": 5}, 400),
    "a list for text": ({"prompt": ["Hello"]}, 400),
    "empty prompt": ({"prompt": ""}, 200),  # Llama starts every text with a token of its own
    "text for a number": ({"max_tokens": "12"}, 400),
    "true for a number": ({"max_tokens": True}, 400),
    "no token": ({"max_tokens": 0}, 400),
    "too many tokens": ({"max_tokens": 10**9}, 400),
    "huge number": ({"seed": 10**30}, 400),
    "not finite": ({"temperature": float("nan")}, 400),
    "negative": ({"temperature": -1}, 400),
    "two answers": ({"n": 2}, 400),
    "unknown field": ({"file": "/etc/passwd"}, 400),
    "penalty": ({"presence_penalty": 0.5}, 400),
    "neutral settings": ({"presence_penalty": 0, "n": 1, "frequency_penalty": 0.0, "best_of": 1}, 200),
    "empty stop": ({"stop": ""}, 400),
    "long stop": ({"stop": "x" * 201}, 413),
    "a path as a model": ({"model": "../../etc/passwd"}, 404),
    "an absolute path as a model": ({"model": "/etc/passwd"}, 404),
    "a path as a description": ({"model": "factory:../../etc/passwd"}, 200),
    "NUL in a description": ({"model": "factory:a\0b"}, 200),
    "no description": ({"model": "factory:  "}, 400),
    "long description": ({"model": "factory:" + "x" * 2001}, 413),
    "other script": ({"model": "factory:Законы \U0001f600 \u202e"}, 200),
    "NUL in a prompt": ({"prompt": "a\0b"}, 200),
    "long prompt": ({"prompt": "word " * 5000}, 400),
    "half of a surrogate pair": ({"model": "factory:\ud800"}, 400),
    "half of a surrogate pair in a prompt": ({"prompt": "\ud800"}, 400),
    "usage without a stream": ({"stream_options": {"include_usage": True}}, 400),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_no_request_is_refused_in_openais_form(server: Running, attack: str) -> None:
    body, status = ATTACKS[attack]
    whole = {"model": "pico-chat", "prompt": "Hello", **GREEDY, **body}
    response = server.client.post(
        "/v1/completions", content=json.dumps(whole), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == status, response.text
    if status != 200:
        assert error_of(response)
    if body.get("stream") is None and status == 400:  # the same in a stream
        streamed = server.client.post(
            "/v1/completions",
            content=json.dumps(whole | {"stream": True} | body),
            headers={"Content-Type": "application/json"},
        )
        assert streamed.status_code == (200 if attack == "usage without a stream" else 400)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"text": "  "}, 400),
        ({"text": 5}, 400),
        ({"text": "x" * 2001}, 413),
        ({"text": "a", "examples": []}, 400),
        ({"text": "a", "examples": ["x"] * 65}, 413),
        ({"text": "a", "examples": ["x" * 8001]}, 413),
        ({"text": "a", "examples": [["a", "b"]]}, 400),
        ({"text": "a", "rank": 99}, 400),
        ({"text": "a", "rank": 0}, 400),
        ({"text": "a", "seed": -1}, 400),
        ({"text": "a", "output_dir": "/tmp/x"}, 400),
        ({"text": {"a": 1.0}}, 400),
        ([], 400),
    ],
)
def test_orders_that_are_none_are_refused(server: Running, body: Any, status: int) -> None:
    response = server.client.post("/adapters", json=body)
    assert response.status_code == status, response.text
    assert error_of(response)


def test_a_prompt_that_cannot_fit_is_refused_by_its_beginning(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenised = []

    def counted(tokenizer: Any, prompt: Any, **options: Any) -> list[int]:
        tokenised.append(prompt)
        return text_tokens(tokenizer, prompt, **options)

    monkeypatch.setattr(engine, "text_tokens", counted)
    monkeypatch.setattr(engine, "chat_tokens", counted)
    long = "ab " * 300_000
    turns = [{"role": "user", "content": long[:450_000]}, {"role": "user", "content": long[:450_000]}]
    answers = [
        complete(server, prompt=long),
        server.client.post("/v1/chat/completions", json={"model": "pico-chat", "messages": turns}),
    ]
    for answer in answers:
        assert answer.status_code == 400
        assert "the prompt has 900,000 characters, and its first" in error_of(answer)
    assert sum(map(len, tokenised)) < 100_000
    tokenised.clear()
    assert complete(server, prompt="Hello").status_code == 200 and tokenised == ["Hello"]


@pytest.mark.parametrize(
    ("path", "body", "where", "message"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": None}]}, "messages.0.content", ""),
        ("/v1/chat/completions", {"messages": [{"role": "assistant"}]}, "messages.0.content", "Field required"),
        ("/v1/chat/completions", {"messages": {"role": "user"}}, "messages", "valid list"),
        ("/v1/completions", {"prompt": "x", "stop": ""}, "stop", "at least 1"),
        ("/v1/completions", {"prompt": "x", "stop": ["a", ""]}, "stop", ""),
        ("/v1/completions", {"prompt": "x", "stream_options": {"file": "x"}}, "stream_options.file", "leave it out"),
        ("/v1/completions", {"max_tokens": 1}, "prompt", "Field required"),
        ("/adapters", {"examples": ["a", {"prompt": 5, "completion": "b"}]}, "examples.1", ""),
    ],
)
def test_errors_name_the_fields_of_the_body(
    server: Running, path: str, body: dict[str, Any], where: str, message: str
) -> None:
    answer = server.client.post(path, json=body if path == "/adapters" else {"model": "pico-chat", **body})
    assert answer.status_code == 400
    assert error_of(answer).startswith(f"{where}: ") and message in error_of(answer)
    assert answer.json()["error"]["param"] == where


def test_a_body_that_is_not_sent_as_json_is_told_how(server: Running) -> None:
    for kind in ("application/x-www-form-urlencoded", "text/plain"):
        answer = server.client.post("/adapters", content=b'{"text": "Legal notices"}', headers={"Content-Type": kind})
        assert answer.status_code == 400
        assert "send Content-Type: application/json" in error_of(answer)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 10_000, b"{}" * 9, b"\0"])
def test_bodies_that_are_no_json_are_refused(server: Running, content: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/adapters"):
        response = server.client.post(path, content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 400 and error_of(response)


def test_a_body_of_ten_megabytes_is_refused(server: Running) -> None:
    body = b'{"model": "' + b"x" * 10_000_000 + b'"}'
    response = server.client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, "larger than" in error_of(response)) == (413, True)
    parts = (b"x" * 65536 for _ in range(160))  # no length is given
    response = server.client.post("/adapters", content=parts, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert server.client.get("/healthz").json() == {"status": "ok"}


def test_other_paths_methods_types_and_hosts_are_refused(server: Running) -> None:
    assert server.client.get("/v1/files").status_code == 404
    assert server.client.get("/adapters/../../etc/passwd").status_code == 404
    assert server.client.get("/adapters").status_code == 405
    assert (
        server.client.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 400
    )
    assert server.client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 400


def test_a_token_is_asked_for(generator_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running(generator_folder, token="s3cret-token") as server:
        assert complete(server).status_code == 200
        for sent in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret-token"}):
            with httpx2.Client(base_url=server.url, headers=sent) as stranger:
                for path in ("/v1/models", "/metrics", "/nothing"):
                    response = stranger.get(path)
                    assert response.status_code == 401 and "give the token" in error_of(response)
                assert stranger.get("/healthz").status_code == 200
    assert "s3cret" not in caplog.text


def test_other_machines_need_a_token(
    generator_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LORA_FACTORY_TOKEN", raising=False)
    assert main(["serve", "--generator", str(generator_folder), "--host", "0.0.0.0"]) == 2
    assert "--host '0.0.0.0' lets other machines in; set the environment variable" in capsys.readouterr().err
    for host in ("127.0.0.1", "::1", "localhost"):
        check_address(host, None)
    check_address("0.0.0.0", "secret")
    with pytest.raises(LoraFactoryError, match="printable ASCII"):
        check_address("0.0.0.0", "two words")


LONG: dict[str, Any] = {"max_tokens": 400}  # the pico model repeats itself and never ends


def test_a_full_queue_refuses_and_a_stop_answers_what_was_taken(generator_folder: Path) -> None:
    with (
        running(generator_folder, batch_size=1, queue=2, max_new_tokens=400) as server,
        ThreadPoolExecutor(6) as pool,
    ):

        def wait_for(metric: str, value: int) -> None:
            while server.metrics()[metric] < value:
                assert not any(one.done() for one in taken)

        for batches in (0, 3):
            taken = [pool.submit(complete, server, **LONG)]
            wait_for("lora_factory_batches_total", batches + 1)  # the model answers the first one, which waits no more
            taken += [pool.submit(complete, server, **LONG) for _ in range(2)]
            wait_for("lora_factory_queue_length", 2)
            refused = complete(server, **LONG)
            assert refused.status_code == 429
            assert "2 requests wait already" in error_of(refused) and refused.headers["Retry-After"]
            if batches:
                server.stop()
            assert [one.result().status_code for one in taken] == [200] * 3
        server.thread.join()
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{server.url}/healthz")


def test_time_is_bounded(generator_folder: Path) -> None:
    with running(generator_folder, timeout=0.001, max_new_tokens=400) as server:
        for stream in (False, True):
            response = complete(server, **LONG, stream=stream)
            assert (response.status_code, "took too long" in error_of(response)) == (504, True)
        examples = ["The quick brown fox jumps over the lazy dog"] * 8
        assert server.client.post("/adapters", json={"text": "a", "examples": examples}).status_code == 504
        assert server.client.get("/healthz").status_code == 200


def test_a_client_that_leaves_ends_its_answer(generator_folder: Path) -> None:
    body = json.dumps({"model": "pico-chat", "prompt": "Hello", **GREEDY, **LONG})
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with running(generator_folder, max_new_tokens=400, batch_size=1) as server:
        assert complete(server, **LONG).json()["usage"]["completion_tokens"] == 400
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            while server.metrics()["lora_factory_batches_total"] < 2:
                pass
        assert complete(server, max_tokens=1).status_code == 200
        assert server.metrics()["lora_factory_generated_tokens_total"] < 400 + 400


def test_memory_does_not_grow_with_descriptions(generator_folder: Path) -> None:
    with running(generator_folder, adapters=2, batch_size=4) as server:
        for number in range(12):
            assert complete(server, model=f"factory:Text number {number}").status_code == 200
        metrics = server.metrics()
    assert metrics["lora_factory_adapters"] == 2
    assert metrics["lora_factory_adapters_generated_total"] == 12
    assert metrics["lora_factory_adapters_evicted_total"] == 10


def test_the_page_shows_commands_that_parse_and_names_what_is_served(server: Running) -> None:
    page = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("lora-factory ")]
    assert len(lines) == 3
    for line in lines:
        parse(shlex.split(line)[1:])
    served = set(server.client.get("/openapi.json").json()["paths"])
    assert set(re.findall(r"`(?:GET|POST) (/[\w/]+)`", page)) == served
