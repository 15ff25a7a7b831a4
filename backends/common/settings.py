"""The settings of both doors: one class, read from the environment once, at the start. Nothing else reads the
environment, and no default hides elsewhere.

Names begin with I2F_. What users of the platforms know already keeps its name beside ours (LABEL_STUDIO_URL, ...).
An empty value means "not set", as compose files write it.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AliasChoices, Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from inter2former.errors import ConfigError

EVERY_HOST = "*"
_HOST = re.compile(r"[a-z0-9._-]+|\[?[0-9a-f:.]+\]?", re.IGNORECASE)


def _known_as(name: str, *others: str) -> AliasChoices:
    return AliasChoices(f"I2F_{name}", *others)


class Settings(BaseSettings):
    """Values are checked one by one; the description of a field is what a person reads when its value is wrong."""

    model_config = SettingsConfigDict(
        env_prefix="I2F_",
        env_ignore_empty=True,
        populate_by_name=True,
        frozen=True,
        extra="ignore",
        allow_inf_nan=False,
    )

    checkpoint: Path | None = Field(
        default=None, description="a readable .safetensors file; not set: the starter weights"
    )
    model_size: Literal["auto"] | int = Field(default="auto", description="auto, or a multiple of 256 from 256 to 4096")
    precision: Literal["float32", "bfloat16", "auto"] = Field(
        default="float32", description="float32, bfloat16 or auto"
    )
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="compute threads, 1 to 1024; not set: all cores"
    )
    cache_dir: Path | None = Field(default=None, description="a folder that can be written to, or be made")
    cache_dir_mb: int = Field(default=4096, ge=1, le=2**20, description="megabytes of that folder, 1 to 1048576")
    cache_mb: int = Field(default=512, ge=0, le=2**20, description="megabytes for image encodings, 0 to 1048576")
    max_pixels: int = Field(default=100_000_000, ge=1, le=10**9, description="pixels of an image, 1 to 1000000000")
    max_download_mb: int = Field(default=64, ge=1, le=4096, description="megabytes of an image file, 1 to 4096")
    fetch_timeout_s: float = Field(
        default=20.0, gt=0, le=90, description="seconds to fetch an image, above 0 and up to 90"
    )
    # Private addresses are where a cloud keeps its secrets, so each one that may be fetched from is named.
    allow_private_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="host names, addresses or networks, separated by commas; true allows every address"
    )
    local_files_root: Path | None = Field(
        default=None,
        validation_alias=_known_as(
            "LOCAL_FILES_ROOT", "LOCAL_FILES_DOCUMENT_ROOT", "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT"
        ),
        description="an existing folder, not the root of the file system",
    )
    basic_auth_user: str | None = Field(default=None, description="a name without a colon; needs I2F_BASIC_AUTH_PASS")
    basic_auth_pass: SecretStr | None = Field(
        default=None, validate_default=True, description="a password; needs I2F_BASIC_AUTH_USER"
    )
    cvat_response: Literal["mask", "shapes", "auto"] = Field(default="auto", description="mask, shapes or auto")
    cvat_servers: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="addresses of servers that compute for the nuclio function, separated by commas"
    )
    log_json: bool = Field(default=False, description="true or false")

    label_studio_url: str | None = Field(
        default=None,
        validation_alias=_known_as("LABEL_STUDIO_URL", "LABEL_STUDIO_URL", "LABEL_STUDIO_HOST"),
        description="the address of Label Studio as this machine reaches it, such as http://label-studio:8080",
    )
    label_studio_api_key: SecretStr | None = Field(
        default=None,
        validation_alias=_known_as("LABEL_STUDIO_API_KEY", "LABEL_STUDIO_API_KEY"),
        description="a personal access token or a legacy token, without blanks",
    )
    correct_within: float = Field(
        default=0.0,
        ge=0,
        le=50,
        description="percent of the image's longer side, 0 to 50; 0: a click always starts a new object",
    )
    polygon_tolerance: float = Field(default=1.5, ge=0, le=100, description="pixels, 0 to 100")
    batch: Literal["off", "prompts"] = Field(default="off", description="off or prompts")
    ahead_tasks: int = Field(default=2, ge=0, le=100, description="tasks, 0 to 100")
    memory_file: Path | None = Field(default=None, description="a file in an existing folder that can be written to")

    cvat_url: str | None = Field(
        default=None,
        validation_alias=_known_as("CVAT_URL", "CVAT_URL"),
        description="the address of CVAT as this machine reaches it, such as https://cvat.example.org",
    )
    cvat_access_token: SecretStr | None = Field(
        default=None,
        validation_alias=_known_as("CVAT_ACCESS_TOKEN", "CVAT_ACCESS_TOKEN"),
        description="an access token of CVAT, without blanks",
    )

    @field_validator("checkpoint")
    @classmethod
    def _is_file(cls, value: Path | None) -> Path | None:
        if value is not None and not (value.is_file() and os.access(value, os.R_OK)):
            raise ValueError
        return value

    @field_validator("memory_file")
    @classmethod
    def _can_be_written(cls, value: Path | None) -> Path | None:
        if value is not None and (value.is_dir() or not os.access(value if value.exists() else value.parent, os.W_OK)):
            raise ValueError
        return value

    @field_validator("model_size", mode="before")
    @classmethod
    def _is_model_size(cls, value: Any) -> Any:
        size = int(value) if isinstance(value, str) and value.isdecimal() else value
        if size != "auto" and not (type(size) is int and 256 <= size <= 4096 and size % 256 == 0):
            raise ValueError
        return size

    @field_validator("allow_private_hosts", mode="before")
    @classmethod
    def _are_hosts(cls, value: Any) -> tuple[str, ...]:
        parts = value.split(",") if isinstance(value, str) else list(value)
        hosts = [str(part).strip().lower() for part in parts if str(part).strip()]
        if len(hosts) == 1 and hosts[0] in ("true", "yes", EVERY_HOST):
            return (EVERY_HOST,)
        if len(hosts) == 1 and hosts[0] in ("false", "no"):
            return ()
        for host in hosts:
            if "/" in host:
                ipaddress.ip_network(host)
            elif not _HOST.fullmatch(host):
                raise ValueError
        return tuple(hosts)

    @field_validator("local_files_root")
    @classmethod
    def _is_folder(cls, value: Path | None) -> Path | None:
        if value is None:
            return None
        root = value.resolve()
        if not root.is_dir() or root == root.parent:
            raise ValueError
        return root

    @field_validator("basic_auth_user")
    @classmethod
    def _is_user(cls, value: str | None) -> str | None:
        if value is not None and ":" in value:
            raise ValueError
        return value

    @field_validator("basic_auth_pass")
    @classmethod
    def _has_both(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if "basic_auth_user" in info.data and (value is None) != (info.data["basic_auth_user"] is None):
            raise ValueError
        return value

    @field_validator("label_studio_url", "cvat_url")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        return None if value is None else http_address(value)

    @field_validator("cvat_servers", mode="before")
    @classmethod
    def _are_addresses(cls, value: Any) -> tuple[str, ...]:
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(http_address(part.strip()) for part in parts)

    @field_validator("label_studio_api_key", "cvat_access_token")
    @classmethod
    def _is_token(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not re.fullmatch(r"[\x21-\x7e]+", value.get_secret_value()):
            raise ValueError
        return value

    def secrets(self) -> tuple[str, ...]:
        """Every secret value, for the log that must not show them."""
        values = (self.basic_auth_pass, self.label_studio_api_key, self.cvat_access_token)
        return tuple(value.get_secret_value() for value in values if value is not None)


def load_settings() -> Settings:
    """The settings of this process. ConfigError with one line for each wrong one, all at once."""
    try:
        return Settings()
    except ValidationError as problem:
        lines = sorted({_line(str(error["loc"][0]), error.get("input")) for error in problem.errors()})
        count = "1 setting is wrong:" if len(lines) == 1 else f"{len(lines)} settings are wrong:"
    raise ConfigError("\n".join([count, *lines]))  # outside of the except: no traceback of the checker's own


def http_address(value: str) -> str:
    """An http(s) address without a slash at its end; ValueError for anything else."""
    parts = urlsplit(value)
    _ = parts.port  # raises ValueError when it is none
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError
    if "@" in parts.netloc or any(ch.isspace() for ch in value):
        raise ValueError
    return value.rstrip("/")


def _line(location: str, value: Any) -> str:
    """NAME=value: what is allowed. A secret's value is not shown."""
    name, field = next(
        (name, field)
        for name, field in Settings.model_fields.items()
        if location.lower() in {known.lower() for known in (name, f"I2F_{name}", *_aliases(field.validation_alias))}
    )
    known = (f"I2F_{name.upper()}", *_aliases(field.validation_alias))
    shown = next((one for one in known if os.environ.get(one)), known[0])
    secret = "SecretStr" in str(field.annotation) or (isinstance(value, str) and "@" in value)
    if value is None:
        text = "is not set"
    elif secret:
        text = "is ***"
    elif isinstance(value, float) and not math.isfinite(value):
        text = f"is {value}"
    else:
        text = f"is {str(value)[:200]!r}"
    return f"  {shown} {text}; allowed: {field.description}"


def _aliases(alias: Any) -> tuple[str, ...]:
    return tuple(str(choice) for choice in alias.choices) if isinstance(alias, AliasChoices) else ()
