"""Settings: where values come from, what is refused, and that no key is ever shown."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic_settings import SettingsError

from deployments.gateway.keys import Keys
from deployments.settings import ENV_PREFIX, Settings, refuse_keys_among
from personaplex.errors import ConfigError


def test_arguments_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONAPLEX_SLOTS", "7")
    monkeypatch.setenv("PERSONAPLEX_PLACEMENT", "spread")
    settings = Settings.model_validate({"slots": "9"})
    assert (settings.slots, settings.placement) == (9, "spread")
    assert Settings.load().slots == 7


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_every_setting_has_a_description_a_default_and_a_variable(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    field = Settings.model_fields[name]
    assert field.description
    assert not field.is_required()
    monkeypatch.setenv(f"{ENV_PREFIX}{name.upper()}", "-7")
    try:
        changed = getattr(Settings(), name)
    except (ValidationError, SettingsError):
        return  # it was read
    assert changed != field.get_default(call_default_factory=True)


@pytest.mark.parametrize("argument", ["api_keys=a", "--set=api_keys=a", "api_keys=[]"])
def test_keys_are_no_arguments_of_a_command(argument: str) -> None:
    with pytest.raises(ConfigError, match="process list") as caught:
        refuse_keys_among(["run", "deployments:build", argument])
    assert "=a" not in str(caught.value)
    refuse_keys_among(["run", "deployments:build", "api_keys_file=keys", "model=tiny"])


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match="slotz"):
        Settings.load({"slotz": 3})


def test_a_variable_that_is_not_json_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONAPLEX_REPLICA_RESOURCES", "gpu=1")
    with pytest.raises(ConfigError, match="replica_resources"):
        Settings.load()


def test_unknown_variables_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONAPLEX_SLOTZ", "3")
    with pytest.raises(ConfigError, match="PERSONAPLEX_SLOTZ"):
        Settings.load()


def test_variables_kubernetes_adds_for_a_service_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVICE_HOST", "SERVICE_PORT", "PORT", "PORT_8998_TCP_ADDR", "HEAD_SVC_SERVICE_PORT_HTTP"):
        monkeypatch.setenv(f"PERSONAPLEX_{name}", "tcp://192.0.2.1:8998")
    assert Settings.load() == Settings()


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"replica_resources": "x"}, "replica_resources"),
        ({"replicas_min": 3, "replicas_max": 2}, "replicas_max"),
        ({"replicas_initial": 2}, "replicas_initial"),
        ({"gateways_min": 2}, "gateways_max"),
        ({"media_port_min": 10, "media_port_max": 9}, "media_port_max"),
        ({"media_port_max": 9}, "media_port_min"),
        ({"slots": 0}, "slots"),
        ({"failover_after_s": 3.4}, "stall_limit_s"),
        ({"stall_limit_s": 4.4}, "failover_after_s"),
        ({"rebuild_audio_s": 0.01}, "rebuild_audio_s"),
        ({"model": "simulated"}, "step_times"),
        ({"step_times": "table.json"}, "step_times"),
        ({"session_limit_s": float("nan")}, "session_limit_s"),
        ({"session_limit_s": float("inf")}, "session_limit_s"),
        ({"device": "tpu"}, "device"),
        ({"api_keys": '["a"'}, "api_keys"),
    ],
)
def test_values_that_make_no_sense_are_refused(values: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Settings.load(values)


def test_lists_are_written_as_json_or_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONAPLEX_ALLOWED_ORIGINS", "https://a.example, https://b.example")
    monkeypatch.setenv("PERSONAPLEX_API_KEYS", '["x,y", "z"]')
    settings = Settings.load()
    assert settings.allowed_origins == ("https://a.example", "https://b.example")
    assert [key.get_secret_value() for key in settings.api_keys] == ["x,y", "z"]


def test_keys_come_from_a_file_too_and_are_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfrom-the-file\n\n")
    settings = Settings(api_keys="from-an-argument", api_keys_file=file)
    table = Keys([key.get_secret_value() for key in settings.api_keys], file).table
    assert table.find("from-an-argument")
    assert table.find("from-the-file")
    assert settings.guarded
    assert "from-" not in str(settings.public()) + repr(settings)


@pytest.mark.parametrize("content", [None, "", "# nothing\n"])
def test_a_key_file_without_keys_opens_no_door(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match="api_keys_file"):
        Keys((), file)


def test_a_wrong_value_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONAPLEX_API_KEYS", '["secret", 5]')
    with pytest.raises(ConfigError) as caught:
        Settings.load()
    assert "secret" not in str(caught.value)


def test_replicas_drain_for_as_long_as_a_session_may_last() -> None:
    settings = Settings(session_limit_s=100, queue_timeout_s=10)
    assert settings.drain_timeout_s > 110
    assert Settings(low_latency=True).gather_s == 0


def test_settings_need_neither_ray_nor_torch() -> None:
    code = "import sys, deployments.settings; print([m for m in ('ray', 'torch') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
