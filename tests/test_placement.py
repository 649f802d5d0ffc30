"""Which way to run the model is chosen on made-up machines, and what the user is told when none fits."""

import os
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from lyra import placement as placement_module
from lyra.errors import UserError
from lyra.hub import MODELS, ModelSource
from lyra.models.cost import count_activations, count_cost
from lyra.models.footprint import (
    LORA,
    OFFLOADS,
    OTHER_PARTS,
    TEXT_EMBEDDING,
    Rates,
    chunk_seconds,
    device_phases,
    host_bytes,
    tile_share,
    tile_work,
)
from lyra.placement import (
    ON_GPU,
    OPTIONAL_PACKAGES,
    Machine,
    Placement,
    best_placement,
    choose_placement,
    host_memory_bytes,
    memory_explained,
    needs,
    next_to_try,
    out_of_memory_sentence,
    plan_placements,
    this_machine,
)

COST = count_cost({}, 480, 832)
GB, GIB = 1e9, 2**30


def machine(name, gpu, host, capability=(8, 9), packages=OPTIONAL_PACKAGES) -> Machine:
    """A machine with so many GiB of GPU and host memory, of which a little is in use."""
    return Machine(
        gpu_name=name,
        gpu_total_gib=gpu,
        gpu_free_gib=0.98 * gpu,
        compute_capability=capability,
        host_total_gib=host,
        host_available_gib=0.95 * host,
        cores=16,
        free_disk_gib=200.0,
        packages=frozenset(packages),
    )


MACHINES = {
    80: machine("NVIDIA H100 80GB HBM3", 79.2, 256, (9, 0)),
    48: machine("NVIDIA RTX A6000", 47.5, 128, (8, 6)),
    24: machine("NVIDIA GeForce RTX 4090", 23.6, 64),
    16: machine("NVIDIA GeForce RTX 4080", 15.7, 64),
    "16 and 128": machine("NVIDIA GeForce RTX 4080", 15.7, 128),
    12: machine("NVIDIA GeForce RTX 3060", 11.8, 64, (8, 6)),
    "12 and 128": machine("NVIDIA GeForce RTX 3060", 11.8, 128, (8, 6)),
    "12 and 32": machine("NVIDIA GeForce RTX 3060", 11.8, 32, (8, 6)),
    8: machine("NVIDIA GeForce RTX 3070", 7.8, 64, (8, 6)),
    "cpu 23": machine(None, 0, 23, (0, 0)),
    "cpu 128": machine(None, 0, 128, (0, 0)),
}

CHOSEN = {
    80: Placement("bf16", "none"),
    48: Placement("bf16", "model"),
    24: Placement("fp8", "group"),
    16: Placement("fp8", "group"),
    "16 and 128": Placement("bf16", "group"),
    12: Placement("fp8", "group", "tiled"),
    "12 and 128": Placement("bf16", "group", "tiled"),
    "12 and 32": None,
    8: None,
    "cpu 23": None,
    "cpu 128": Placement("fp32", device="cpu"),
}
"""What each machine gets by itself; None where nothing fits. Streamed bf16 weights want more than 64 GiB of host
memory, because pinned memory is rounded up to powers of two."""


def rank(found: Machine) -> int:
    """Place of the chosen placement in the order, worse than all where none fits."""
    try:
        return ON_GPU.index(best_placement(found, COST).placement)
    except UserError:
        return len(ON_GPU)


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("released", [True, False])
def test_each_machine_gets_what_is_stated(name, released):
    assert CHOSEN.keys() == MACHINES.keys()
    if CHOSEN[name] is None:
        with pytest.raises(UserError, match="does not fit this machine"):
            best_placement(MACHINES[name], COST, released=released)
    else:
        assert best_placement(MACHINES[name], COST, released=released).placement == CHOSEN[name]


@pytest.mark.parametrize(("offload", "gigabytes"), [("none", 56), ("model", 40)])
def test_published_memory_plan_of_bf16_weights_is_met(offload, gigabytes):
    assert device_phases(COST, Placement("bf16", offload)).peak / GB == pytest.approx(gigabytes, rel=0.15)


@pytest.mark.parametrize(("weights", "gigabytes"), [("fp8", 21.5), ("nf4", 13.2)])
def test_published_memory_plan_of_fewer_bits_is_met_but_for_what_it_leaves_out(weights, gigabytes):
    peak, act, c = device_phases(COST, Placement(weights, "model")).peak, count_activations(COST, 2), COST.config
    assert peak / GB > 1.15 * gigabytes
    # Inputs kept in float32, what ten chunks leave, keys and values of two texts, and a LoRA beside the weights.
    texts = 2 * 2 * c.num_layers * (2 * c.text_len + COST.image_tokens) * c.dim
    assert (peak - act.inputs - act.remembered - texts - LORA) / GB == pytest.approx(gigabytes, rel=0.15)


def test_published_memory_plan_of_streamed_blocks_is_met_for_the_weights_alone():
    for weights in ("bf16", "fp8"):
        phases, act = device_phases(COST, Placement(weights, "group")), count_activations(COST, 2)
        assert phases.peak / GB > 8 * 1.15
        # The plan has 3.5 GB beside the weights; what is counted is more, and measuring depth needs more than that.
        assert 6 * 0.85 < (phases.denoise - act.denoise - act.inputs - act.remembered + 3.5 * GB) / GB < 8 * 1.15
        assert phases.peak == phases.depth


def test_every_phase_of_every_placement_is_counted():
    for placement in ON_GPU:
        phases = vars(device_phases(COST, placement))
        assert all(size > 1 * GB for name, size in phases.items() if name != "load")
        assert (phases["load"] > 0) == (placement.weights == "nf4")


def test_caches_and_text_encoder_are_off_the_device_where_networks_move():
    act = count_activations(COST, 2)
    resident, moved, streamed = (device_phases(COST, Placement("bf16", offload)) for offload in OFFLOADS)
    weights = OTHER_PARTS["image"] + OTHER_PARTS["depth"]
    assert resident.denoise - moved.denoise == pytest.approx(act.decoder_cache + act.encoder_cache + weights)
    assert moved.text - streamed.text == pytest.approx(OTHER_PARTS["text"] - TEXT_EMBEDDING)
    # 4-bit weights leave the device, too.
    four_bit = device_phases(COST, Placement("nf4", "model"))
    assert four_bit.depth == moved.depth < four_bit.denoise


def test_pinned_memory_is_counted_where_weights_are_streamed():
    model, group = (host_bytes(COST, Placement("bf16", offload)) for offload in ("model", "group"))
    # Originals and their pinned copies, for a moment.
    assert group - model > COST.parameters.block_bytes("bf16")
    assert host_bytes(COST, Placement("nf4", "model")) < host_bytes(COST, Placement("bf16", "model"))


def test_fewer_bits_and_more_moving_never_take_more_memory():
    def peak(*settings) -> float:
        return device_phases(COST, Placement(*settings)).peak

    for offload in OFFLOADS:
        peaks = [peak(weights, offload) for weights in ("bf16", "fp8", "nf4")]
        assert peaks == sorted(peaks, reverse=True)
    for weights in ("bf16", "fp8", "nf4"):
        peaks = [peak(weights, offload) for offload in OFFLOADS]
        assert peaks == sorted(peaks, reverse=True)
        assert peak(weights, "group", "tiled") <= peak(weights, "group")


def test_tiles_are_offered_where_they_take_less_memory_and_then_decide():
    tiled = [planned for planned in plan_placements(MACHINES[12], COST) if planned.placement.decode == "tiled"]
    assert [planned.placement.offload for planned in tiled] == ["group"] * 3
    for planned in tiled:
        whole = needs(replace(planned.placement, decode="streamed"), COST)
        assert planned.needs.gpu_gib < MACHINES[12].gpu_free_gib < whole.gpu_gib
    with pytest.raises(UserError, match=r"--offload group.*; use --weights fp8 --offload group --decode tiled, which"):
        best_placement(MACHINES[12], COST, decode="streamed")
    streamed = Placement("fp8", "group", cost=COST)
    assert next_to_try(streamed, MACHINES[12]) == replace(streamed, decode="tiled")
    # A model so large that denoising decides has nothing from them.
    large = count_cost({"num_layers": 400}, 480, 832)
    assert not any(planned.placement.decode == "tiled" for planned in plan_placements(MACHINES[80], large))


def test_released_files_are_not_chosen_for_4_bit_weights():
    plans = plan_placements(MACHINES[80], COST, released=True)
    for planned in plans:
        assert planned.fits == (planned.placement.weights != "nf4")
        assert ("needs a converted model" in planned.verdict) == (planned.placement.weights == "nf4")
    # Room for 4-bit weights only.
    roomy = needs(Placement("nf4", "model"), COST)
    found = replace(MACHINES[48], gpu_free_gib=roomy.gpu_gib + 1, host_available_gib=roomy.host_gib + 1)
    assert best_placement(found, COST).placement == Placement("nf4", "model")
    convert = r"run python -m lyra convert nvidia/Lyra-2\.0 --out FOLDER once and use --model FOLDER"
    for weights in ("nf4", None):
        with pytest.raises(UserError, match=rf"needs a converted model; {convert}\.$"):
            best_placement(found, COST, weights, model="nvidia/Lyra-2.0", released=True)
    without = replace(found, packages=frozenset({"accelerate"}))
    with pytest.raises(UserError, match=rf"run pip install bitsandbytes and {convert}"):
        best_placement(without, COST, "nf4", model="nvidia/Lyra-2.0", released=True)
    with pytest.raises(UserError, match=rf"{convert}, and --weights nf4 --offload model fits\.$"):
        best_placement(found, COST, "bf16", model="nvidia/Lyra-2.0", released=True)
    last = Placement("fp8", "group", "tiled", cost=COST, released=True)
    assert next_to_try(last, MACHINES[80]) is None
    assert next_to_try(Placement("fp8", "group", "tiled", released=True), MACHINES[80]) is None


def test_the_best_that_fits_is_chosen_and_fits():
    for found in MACHINES.values():
        plans = plan_placements(found, COST)
        fitting = [planned for planned in plans if planned.fits]
        if fitting:
            assert best_placement(found, COST) == fitting[0]
        for planned in plans:
            assert planned.fits == (planned.verdict == "fits")
            assert planned.fits == (
                planned.needs.gpu_gib <= found.gpu_free_gib and planned.needs.host_gib <= found.host_available_gib
            )


@pytest.mark.parametrize("host", [16, 32, 48, 64, 128])
def test_more_gpu_memory_never_gives_a_worse_choice(host):
    ranks = [rank(machine("NVIDIA GeForce RTX 4090", gpu / 2, host)) for gpu in range(8, 192)]
    assert all(more <= less for less, more in pairwise(ranks))


def test_more_host_memory_never_gives_a_worse_choice():
    for gpu in (8, 12, 16, 24, 48, 80):
        ranks = [rank(machine("NVIDIA GeForce RTX 4090", gpu, host)) for host in range(8, 160, 4)]
        assert all(more <= less for less, more in pairwise(ranks))


def test_a_named_placement_is_used_where_it_fits():
    found = best_placement(MACHINES[80], COST, weights="fp8", offload="group")
    assert found.placement == Placement("fp8", "group")
    assert best_placement(MACHINES[80], COST, decode="tiled").placement == Placement("bf16", "none", "tiled")
    assert best_placement(MACHINES[12], COST, "fp8", "group").placement == Placement("fp8", "group", "tiled")
    assert best_placement(machine("A100", 160, 256), COST, weights="fp32").placement == Placement("fp32", "none")


def test_a_named_placement_that_does_not_fit_is_refused_with_one_that_does():
    with pytest.raises(UserError) as error:
        best_placement(MACHINES[48], COST, weights="bf16", offload="none", model="nvidia/Lyra-2.0")
    short = needs(Placement(), COST).gpu_gib - MACHINES[48].gpu_free_gib
    other = best_placement(MACHINES[48], COST).placement.options
    assert f"--weights bf16 --offload none needs {needs(Placement(), COST).gpu_gib:.1f} GiB" in str(error.value)
    assert f"{short:.1f} GiB more than is free; use {other}, which fits." in str(error.value)


def test_a_card_that_is_too_small_is_told_how_much_the_smallest_mode_lacks():
    small = machine("NVIDIA GeForce GTX 1650", 4, 64, (8, 0))
    nearest = min(plan_placements(small, COST), key=lambda planned: planned.gpu_short_gib + planned.host_short_gib)
    with pytest.raises(UserError) as error:
        best_placement(small, COST, model="nvidia/Lyra-2.0")
    sentence = str(error.value)
    assert f"{nearest.gpu_short_gib:.1f} GiB more than is free" in sentence
    assert f"even {nearest.placement.options} needs {nearest.needs.gpu_gib:.1f} GiB of GPU memory" in sentence
    assert "--model lyra-tiny" in sentence and sentence.startswith("nvidia/Lyra-2.0")


def test_without_a_gpu_the_sentence_says_what_float32_takes():
    with pytest.raises(UserError, match=r"17\.0 billion weights alone are 68 GB in float32.*GiB more than is free"):
        best_placement(MACHINES["cpu 23"], COST)
    with pytest.raises(UserError, match=r"Without a GPU .* --weights and --offload"):
        best_placement(MACHINES["cpu 128"], COST, weights="fp8")


def test_an_old_gpu_and_a_missing_package_are_named():
    with pytest.raises(UserError, match=r"compute capability 8\.0, and Tesla T4 has 7\.5"):
        best_placement(machine("Tesla T4", 15, 64, (7, 5)), COST)
    without = machine("NVIDIA H100 80GB HBM3", 79.2, 256, (9, 0), packages=["accelerate"])
    with pytest.raises(UserError, match=r"the package bitsandbytes; use --weights bf16 --offload none, which fits"):
        best_placement(without, COST, weights="nf4")
    # Only 4-bit weights would find room in host memory.
    narrow = replace(without, host_available_gib=needs(Placement("nf4", "none"), COST).host_gib + 1)
    with pytest.raises(UserError, match="run pip install bitsandbytes"):
        best_placement(narrow, COST)


@pytest.mark.parametrize(("option", "value"), [("weights", "int2"), ("offload", "disk"), ("decode", "fast")])
def test_a_setting_that_does_not_exist_is_refused(option, value):
    with pytest.raises(UserError, match=f"--{option} is '{value}'; choose one of"):
        best_placement(MACHINES[80], COST, **{option: value})


def test_after_running_out_of_memory_smaller_and_smaller_modes_are_tried():
    found, tried = MACHINES[80], [Placement("bf16", "none", cost=COST)]
    while (following := next_to_try(tried[-1], found)) is not None:
        tried.append(following)
    peaks = [needs(placement, COST).gpu_gib for placement in tried]
    assert len(tried) >= 3
    assert all(after <= 0.95 * before for before, after in pairwise(peaks))
    assert next_to_try(Placement("fp32", device="cpu"), found) is None


def test_the_sentence_after_running_out_of_memory_names_the_next_mode_and_its_size():
    sentence = out_of_memory_sentence(Placement("bf16", "model", cost=COST), MACHINES[48])
    following = next_to_try(Placement("bf16", "model", cost=COST), MACHINES[48])
    assert "48 GiB of GPU memory were not enough for --weights bf16 --offload model" in sentence
    assert f"try {following.options}, which takes about {needs(following, COST).gpu_gib:.1f} GiB." in sentence
    last = Placement("nf4", "group", cost=COST)
    assert "no smaller mode runs here" in out_of_memory_sentence(last, MACHINES[8])
    assert out_of_memory_sentence(Placement(), MACHINES[8]).endswith("try --weights bf16 --offload model.")


def test_running_out_of_gpu_memory_becomes_a_sentence_and_other_errors_stay():
    with pytest.raises(UserError, match="try --weights fp8 --offload model"), memory_explained(Placement("fp8")):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="something else"), memory_explained(Placement()):
        raise RuntimeError("something else")


def test_placements_say_their_options_numbers_and_formats():
    assert Placement("fp8", "group").options == "--weights fp8 --offload group"
    assert Placement("bf16", decode="tiled").options == "--weights bf16 --offload none --decode tiled"
    assert Placement("fp32", device="cpu").dtype == torch.float32
    assert Placement("fp8", device="cpu").dtype == torch.float32
    assert Placement("nf4").dtype == torch.bfloat16
    assert Placement("bf16", "none").numbers == Placement("bf16", "group").numbers != Placement("fp8").numbers
    assert Placement("nf4").packages == ("accelerate", "bitsandbytes")
    assert Placement("fp32", device="cpu").packages == ()


def test_tiles_cover_the_frame():
    # 256-pixel tiles about every 192 pixels: 3 x 4 of them on 480 x 832.
    assert tile_work(COST) == pytest.approx(12 * 256 * 256 / (480 * 832))
    assert tile_share(COST) == pytest.approx(256 * 256 / (480 * 832))
    assert tile_work(count_cost({}, 128, 128)) == tile_share(count_cost({}, 128, 128)) == 1


def test_times_follow_from_flops_bandwidth_and_steps():
    def seconds(rates, steps, *settings, guided=False) -> float:
        return chunk_seconds(COST, rates, steps, Placement(*settings), guided=guided)

    rates = Rates(790, 790, "")
    bare = seconds(rates, 4)
    denoising = 4 * COST.flops.per_forward / 790e12
    assert denoising < bare < denoising + 5
    longer = seconds(rates, 35, guided=True) - bare
    assert longer == pytest.approx(66 * denoising / 4, rel=0.01)  # 70 passes and 4.
    assert seconds(rates, 4, "bf16", "model") > bare + 2 * 34e9 / 8e9
    # 4-bit weights come and go like others, and every tile's cache for each of five pieces.
    assert seconds(rates, 4, "nf4", "model") > seconds(rates, 4, "nf4", "none") + 2 * 9e9 / 8e9
    assert seconds(rates, 4, "bf16", "group", "tiled") > seconds(rates, 4, "bf16", "group") + 5
    # A slow GPU hides the streaming, a fast one waits for it.
    slow, fast = Rates(60, 60, ""), Rates(5000, 5000, "")
    for speed, hidden in ((slow, True), (fast, False)):
        denoise = [seconds(speed, steps, "bf16", "group") - seconds(speed, steps) for steps in (4, 40)]
        assert (denoise[1] == pytest.approx(denoise[0])) == hidden


def test_the_shipped_model_stays_on_the_processor_in_float32():
    source = ModelSource("lyra-tiny", MODELS / "lyra-tiny", "lyra", {}, shipped=True)
    assert choose_placement(source, device="cpu") == Placement("fp32", device="cpu")
    named = choose_placement(source, device="cpu", weights="fp8", offload="group")
    assert named == Placement("fp8", "group", device="cpu")
    with pytest.raises(UserError, match="--weights is 'int2'"):
        choose_placement(source, device="cpu", weights="int2")
    with pytest.raises(UserError, match="4-bit weights are made on a CUDA GPU"):
        choose_placement(source, device="cpu", weights="nf4")


def test_a_large_model_is_planned_from_its_own_sizes(tmp_path, monkeypatch):
    source = ModelSource("nvidia/Lyra-2.0", tmp_path, "released", {}, shipped=False)
    weights = tmp_path / "model" / "model" / "__0_0.distcp"
    weights.parent.mkdir(parents=True)
    weights.touch()
    os.truncate(weights, 3 * 10**9)
    monkeypatch.setattr(placement_module, "this_machine", lambda device: MACHINES["cpu 128"])
    chosen = choose_placement(source, device="cpu")
    assert chosen == Placement("fp32", device="cpu") and chosen.cost == COST and chosen.released
    (tmp_path / "sizes.json").write_text('{"transformer": {"num_layers": 80}}')
    with pytest.raises(UserError, match=r"nvidia/Lyra-2\.0 does not fit .* its 33\.8 billion weights"):
        choose_placement(source, device="cpu")
    (tmp_path / "sizes.json").write_text("{")
    with pytest.raises(UserError, match=r"sizes\.json cannot be read"):
        choose_placement(source, device="cpu")


def test_this_machine_is_read():
    found = this_machine(torch.device("cpu"))
    assert found.gpu_name is None and found.cores >= 1
    assert 0 < found.host_available_gib <= found.host_total_gib
    assert "accelerate" in found.packages


def test_a_container_has_no_more_memory_than_its_limit(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 64000 kB\nMemFree: 10 kB\nMemAvailable:   50000 kB\n")
    assert host_memory_bytes(tmp_path) == (64_000 * 1024, 50_000 * 1024)
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert host_memory_bytes(tmp_path) == (64_000 * 1024, 50_000 * 1024)
    (group / "memory.max").write_text(f"{20_000 * 1024}\n")
    (group / "memory.current").write_text(f"{9_000 * 1024}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {4_000 * 1024}\n")
    assert host_memory_bytes(tmp_path) == (20_000 * 1024, 15_000 * 1024)
