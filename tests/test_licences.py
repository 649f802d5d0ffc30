"""The licence gate: what is asked, how an acceptance is remembered, and what survives a damaged file."""

import json
import logging
import threading
from datetime import datetime, timezone

import pytest

from lyra import __version__, licences
from lyra.errors import UserError
from lyra.licences import APACHE_2, CC_BY_NC_4, LICENCES, MIT, NVIDIA_RESEARCH


@pytest.fixture(autouse=True)
def config(tmp_path, monkeypatch):
    """A config folder of the test's own, and no setting of the machine's."""
    for name in ("LYRA_ACCEPT_LICENCE", "LYRA_NO_GATED_MODELS", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "config"
    monkeypatch.setenv("LYRA_CONFIG_DIR", str(folder))
    return folder


def refusal(*needed) -> str:
    with pytest.raises(UserError) as caught:
        licences.require(needed)
    return str(caught.value)


def test_the_refusal_names_the_licence_its_terms_and_every_way_to_accept():
    text = refusal(NVIDIA_RESEARCH)
    for part in (NVIDIA_RESEARCH.name, NVIDIA_RESEARCH.applies_to, NVIDIA_RESEARCH.forbids, NVIDIA_RESEARCH.url):
        assert part in text
    for way in ("--accept-licence", "LYRA_ACCEPT_LICENCE=nvidia-research", "checkbox"):
        assert way in text
    assert text.endswith(".") and "\n" not in text


def test_the_research_licence_is_told_as_forbidding_deployment_and_commercial_use():
    for word in ("commercial", "production", "deployment", "passing on", "derived", "research"):
        assert word in NVIDIA_RESEARCH.forbids


def test_the_refusal_names_only_what_is_missing():
    licences.accept(NVIDIA_RESEARCH, "command line")
    text = refusal(APACHE_2, NVIDIA_RESEARCH, CC_BY_NC_4, CC_BY_NC_4)
    assert text.count(CC_BY_NC_4.name) == 1
    assert NVIDIA_RESEARCH.name not in text and APACHE_2.name not in text


def test_free_licences_need_no_acceptance_and_leave_no_file(config):
    licences.require([APACHE_2, MIT])
    assert not config.exists()


def test_an_acceptance_is_remembered_with_date_version_and_how(config):
    before = datetime.now(timezone.utc).replace(microsecond=0)
    given = licences.accept(NVIDIA_RESEARCH, "app")
    assert licences.accepted(NVIDIA_RESEARCH) == given
    assert (given.licence, given.version, given.how) == ("nvidia-research", __version__, "app")
    assert before <= datetime.fromisoformat(given.date) <= datetime.now(timezone.utc)
    assert json.loads((config / "licences.json").read_text())["accepted"][0]["date"] == given.date
    licences.require([NVIDIA_RESEARCH])
    assert licences.accepted(CC_BY_NC_4) is None


def test_acceptances_add_up_and_no_temporary_file_stays(config):
    first = licences.accept(NVIDIA_RESEARCH, "app")
    licences.accept(CC_BY_NC_4, "command line")
    assert licences.accepted(NVIDIA_RESEARCH) == first
    licences.require([NVIDIA_RESEARCH, CC_BY_NC_4])
    assert [path.name for path in config.iterdir()] == ["licences.json"]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b'{"accepted": [',
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b'{"accepted": 3}',
        b'{"accepted": [{"licence": "nvidia-research"}]}',
        b'{"accepted": [{"licence": "nvidia-research", "date": "soon", "version": "1", "how": "app"}]}',
        b'{"accepted": [{"licence": "nvidia-research", "date": 5, "version": "1", "how": "app"}]}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_means_nothing_is_accepted_and_is_kept(config, damage):
    config.mkdir()
    (config / "licences.json").write_bytes(damage)
    assert licences.accepted(NVIDIA_RESEARCH) is None
    assert NVIDIA_RESEARCH.name in refusal(NVIDIA_RESEARCH)
    licences.accept(NVIDIA_RESEARCH, "app")
    licences.require([NVIDIA_RESEARCH])
    assert [path.read_bytes() for path in config.glob("*.damaged-*")] == [damage]


def test_a_second_damaged_file_does_not_replace_the_first(config):
    config.mkdir()
    for text in ("one", "two"):
        (config / "licences.json").write_text(text)
        assert licences.accepted(NVIDIA_RESEARCH) is None
    assert sorted(path.read_text() for path in config.glob("*.damaged-*")) == ["one", "two"]


def test_a_failed_write_leaves_the_old_acceptances(config, monkeypatch):
    licences.accept(NVIDIA_RESEARCH, "app")
    monkeypatch.setattr(licences.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(UserError, match="LYRA_CONFIG_DIR"):
        licences.accept(CC_BY_NC_4, "app")
    assert licences.accepted(NVIDIA_RESEARCH) is not None
    assert [path.name for path in config.iterdir()] == ["licences.json"]


def test_readers_never_see_half_a_file(config):
    licences.accept(NVIDIA_RESEARCH, "app")
    seen, stop = [], threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.append(licences.accepted(NVIDIA_RESEARCH) is not None)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(50):
        licences.accept(CC_BY_NC_4, "app")
    stop.set()
    reader.join()
    assert seen and all(seen)
    assert not list(config.glob("*.damaged-*"))


def test_the_environment_accepts_and_is_recorded_when_it_is_relied_on(config, monkeypatch):
    monkeypatch.setenv("LYRA_ACCEPT_LICENCE", " NVIDIA-Research ,cc-by-nc-4.0")
    assert licences.accepted(NVIDIA_RESEARCH).how == "environment"
    assert not config.exists()
    licences.require([NVIDIA_RESEARCH, CC_BY_NC_4])
    monkeypatch.delenv("LYRA_ACCEPT_LICENCE")
    assert licences.accepted(NVIDIA_RESEARCH).how == "environment"
    assert licences.accepted(CC_BY_NC_4).how == "environment"


def test_the_environment_counts_where_nothing_can_be_written(config, monkeypatch, tmp_path):
    monkeypatch.setenv("LYRA_ACCEPT_LICENCE", "nvidia-research")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LYRA_CONFIG_DIR", str(tmp_path / "file" / "folder"))
    licences.require([NVIDIA_RESEARCH])


def test_a_misspelt_id_in_the_environment_is_told_and_accepts_nothing(monkeypatch, caplog):
    monkeypatch.setenv("LYRA_ACCEPT_LICENCE", "nvidia")
    with caplog.at_level(logging.WARNING):
        refusal(NVIDIA_RESEARCH)
    assert "LYRA_ACCEPT_LICENCE names no licence: nvidia;" in caplog.text


@pytest.mark.parametrize("value", ["1", "true", "no"])
def test_the_switch_refuses_even_what_is_accepted(monkeypatch, value):
    licences.accept(NVIDIA_RESEARCH, "app")
    monkeypatch.setenv("LYRA_NO_GATED_MODELS", value)
    assert not licences.gated_models_allowed()
    text = refusal(NVIDIA_RESEARCH)
    assert "switched off" in text and "LYRA_NO_GATED_MODELS" in text and NVIDIA_RESEARCH.name in text
    licences.require([APACHE_2, MIT])


@pytest.mark.parametrize("value", ["", "0"])
def test_an_empty_switch_is_off(monkeypatch, value):
    monkeypatch.setenv("LYRA_NO_GATED_MODELS", value)
    assert licences.gated_models_allowed()


def test_the_config_folder_follows_the_environment(monkeypatch, tmp_path, config):
    assert licences.config_folder() == config
    monkeypatch.delenv("LYRA_CONFIG_DIR")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert licences.config_folder() == tmp_path / "xdg" / "lyra"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert licences.config_folder() == tmp_path / "home" / ".config" / "lyra"


def test_an_unwritable_config_folder_is_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LYRA_CONFIG_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"set LYRA_CONFIG_DIR to a folder that you may write\.$"):
        licences.accept(NVIDIA_RESEARCH, "app")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Apache-2.0", (APACHE_2,)),
        ("apache 2.0", (APACHE_2,)),
        ("nvidia-research", (NVIDIA_RESEARCH,)),
        ("NVIDIA Internal Scientific Research and Development Model License", (NVIDIA_RESEARCH,)),
        ("nvidia-internal-scientific-research-and-development-model-license", (NVIDIA_RESEARCH,)),
        ("CC BY-NC 4.0", (CC_BY_NC_4,)),
        ("nvidia-research and CC-BY-NC-4.0", (NVIDIA_RESEARCH, CC_BY_NC_4)),
    ],
)
def test_a_text_names_licences_by_id_or_name(text, expected):
    assert licences.named_in(text) == expected


def test_an_unknown_licence_is_kept_as_it_is_written():
    (licence,) = licences.named_in("Summit Licence 1")
    assert licence.name == "Summit Licence 1" and not licence.gated
    assert "Summit Licence 1" in licences.notice([licence])


def test_ids_are_found_in_any_case_and_unknown_ones_are_a_sentence():
    assert licences.by_id("NVIDIA-RESEARCH") is NVIDIA_RESEARCH
    with pytest.raises(UserError, match=r"choose one of: Apache-2\.0, MIT, nvidia-research, CC-BY-NC-4\.0\."):
        licences.by_id("gpl")


def test_every_part_of_the_released_model_has_a_licence():
    parts = licences.RELEASED_PARTS
    assert {name for name, licence in parts.items() if licence is NVIDIA_RESEARCH} == {
        "transformer",
        "lora",
        "reconstruction",
        "negative_prompt",
    }
    assert parts["autoencoder"] is parts["text_encoder"] is parts["tokenizer"] is APACHE_2
    assert parts["image_encoder"] is MIT


def test_large_depth_networks_are_gated_and_small_ones_are_not():
    gated = {name for name, licence in licences.DEPTH_ANYTHING_3.items() if licence.gated}
    assert {"DA3-LARGE", "DA3-GIANT", "DA3NESTED-GIANT-LARGE-1.1"} <= gated
    assert gated.isdisjoint({"DA3-SMALL", "DA3-BASE", "DA3MONO-LARGE", "DA3METRIC-LARGE"})


def test_the_notice_tells_each_licence_once():
    text = licences.notice(licences.RELEASED_PARTS.values())
    assert text.count("\n\n") == 2
    for licence in (NVIDIA_RESEARCH, APACHE_2, MIT):
        assert text.count(f"{licence.name} ({licence.id})\n") == 1
        assert f"Forbids: {licence.forbids}." in text and licence.url in text
    assert text.count("Must be accepted") == 1


def test_ids_are_unique_and_every_url_is_secure():
    assert len({licence.id.lower() for licence in LICENCES}) == len(LICENCES)
    assert all(licence.url.startswith("https://") for licence in LICENCES)
