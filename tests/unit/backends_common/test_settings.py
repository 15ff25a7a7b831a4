"""Settings: what is read, and that wrong ones are all named at once (R17)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from backends.common.settings import EVERY_HOST, Settings, load_settings
from inter2former.errors import ConfigError


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("I2F_", "LABEL_STUDIO_", "LOCAL_FILES_", "CVAT_")):
            monkeypatch.delenv(name)


def test_defaults_need_nothing() -> None:
    settings = load_settings()
    assert (settings.checkpoint, settings.model_size, settings.threads) == (None, "auto", None)
    assert settings.allow_private_hosts == ()
    assert settings.cvat_response == "auto"


def test_every_setting_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    weights.touch()
    for name, value in {
        "I2F_CHECKPOINT": str(weights),
        "I2F_MODEL_SIZE": "1024",
        "I2F_THREADS": "3",
        "I2F_CACHE_MB": "7",
        "I2F_MAX_PIXELS": "1000",
        "I2F_MAX_DOWNLOAD_MB": "2",
        "I2F_FETCH_TIMEOUT_S": "1.5",
        "I2F_ALLOW_PRIVATE_HOSTS": "minio, 10.0.0.0/8,[fd00::1]",
        "I2F_BASIC_AUTH_USER": "user",
        "I2F_BASIC_AUTH_PASS": "pass word",
        "I2F_CVAT_RESPONSE": "shapes",
        "I2F_LOG_JSON": "true",
        "LABEL_STUDIO_URL": "http://ls:8080/",
        "LABEL_STUDIO_API_KEY": "abc",
        "LOCAL_FILES_DOCUMENT_ROOT": str(tmp_path),
        "CVAT_URL": "https://cvat.example.org",
        "CVAT_ACCESS_TOKEN": "def",
    }.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert settings.checkpoint == weights
    assert (settings.model_size, settings.threads, settings.cache_mb) == (1024, 3, 7)
    assert (settings.max_pixels, settings.max_download_mb, settings.fetch_timeout_s) == (1000, 2, 1.5)
    assert settings.allow_private_hosts == ("minio", "10.0.0.0/8", "[fd00::1]")
    assert settings.basic_auth_user == "user"
    assert settings.local_files_root == tmp_path.resolve()
    assert settings.label_studio_url == "http://ls:8080"
    assert settings.log_json
    assert settings.cvat_response == "shapes"
    assert set(settings.secrets()) == {"pass word", "abc", "def"}


def test_an_empty_value_is_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("I2F_CHECKPOINT", "")
    monkeypatch.setenv("LABEL_STUDIO_URL", "")
    assert load_settings() == Settings()


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("true", (EVERY_HOST,)),
        ("*", (EVERY_HOST,)),
        ("false", ()),
        (" ", ()),
        ("a.b", ("a.b",)),
        ("127.0.0.1", ("127.0.0.1",)),
    ],
)
def test_private_hosts(monkeypatch: pytest.MonkeyPatch, text: str, hosts: tuple[str, ...]) -> None:
    monkeypatch.setenv("I2F_ALLOW_PRIVATE_HOSTS", text)
    assert load_settings().allow_private_hosts == hosts


WRONG = [
    ("I2F_CHECKPOINT", "/no/such/file.safetensors"),
    ("I2F_MODEL_SIZE", "1000"),
    ("I2F_MODEL_SIZE", "big"),
    ("I2F_THREADS", "0"),
    ("I2F_CACHE_MB", "lots"),
    ("I2F_MAX_PIXELS", "-1"),
    ("I2F_MAX_DOWNLOAD_MB", "0"),
    ("I2F_FETCH_TIMEOUT_S", "inf"),
    ("I2F_FETCH_TIMEOUT_S", "nan"),
    ("I2F_ALLOW_PRIVATE_HOSTS", "10.0.0.0/99"),
    ("I2F_ALLOW_PRIVATE_HOSTS", "http://minio"),
    ("I2F_LOCAL_FILES_ROOT", "/"),
    ("LOCAL_FILES_DOCUMENT_ROOT", "/no/such/folder"),
    ("I2F_BASIC_AUTH_USER", "a:b"),
    ("I2F_CVAT_RESPONSE", "polygon"),
    ("I2F_LOG_JSON", "perhaps"),
    ("LABEL_STUDIO_URL", "label-studio:8080"),
    ("LABEL_STUDIO_HOST", "http://ls:99999"),
    ("CVAT_URL", "ftp://cvat"),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_setting_is_named_with_its_value(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as problem:
        load_settings()
    lines = str(problem.value).splitlines()
    assert any(line.strip().startswith(f"{name} is") and value in line and "allowed: " in line for line in lines)


def test_r17_all_wrong_settings_are_listed_at_once_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "I2F_THREADS": "x",
        "I2F_MODEL_SIZE": "7",
        "I2F_BASIC_AUTH_PASS": "hidden-canary",
        "LABEL_STUDIO_API_KEY": "two words-canary",
        "LABEL_STUDIO_URL": "http://user:url-canary@ls",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as problem:
        load_settings()
    text = str(problem.value)
    assert len(text.splitlines()) == 6
    assert "canary" not in text
    assert "canary" not in repr(problem.value.__cause__)
    assert problem.value.__context__ is None
